"""How tests name the types of elements of the C interface, and which of them goes with a slot."""

from c_interface import BF16, F16, F32, F64, SIGNED, UNSIGNED
from tables import KEEPS_FLOAT32, in_8_bits

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
NUMBERS = ("mu_product",)


def state_type(name, state):
    """Return how a state array is stored where state is to be of such a type."""
    if name in NUMBERS:
        return "float64"
    if name in KEEPS_FLOAT32 or state == "8-bit":
        return in_8_bits(name)
    return state
