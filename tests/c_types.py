"""How tests name the types of elements of the C interface, and which of them goes with a slot."""

from c_interface import BF16, F16, F32, F64, SIGNED, UNSIGNED

SPLIT, MASTER = "bfloat16 with trailing bits", "float16 with master"
TYPES = {
    "float32": F32,
    "float64": F64,
    "bfloat16": BF16,
    "float16": F16,
    SPLIT: BF16,
    MASTER: F16,
    "8-bit unsigned": UNSIGNED,
    "8-bit signed": SIGNED,
}
NEVER_NEGATIVE, EXACT = (
    ("exp_avg_sq", "square_avg", "sum"),
    ("max_exp_avg_sq", "grad_avg", "exp_inf"),
)


def state_type(name, state):
    """Return how a state array is stored where state is to be of such a type."""
    if name in EXACT:
        return "float32"
    if state == "8-bit":
        return "8-bit unsigned" if name in NEVER_NEGATIVE else "8-bit signed"
    return state
