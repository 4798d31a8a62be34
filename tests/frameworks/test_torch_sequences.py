"""Random sequences of operations on an optimizer of fastopt.torch, beside its namesake of PyTorch.

Every operation is done to both. Then both raise or neither does; parameters and state are equal to
a few ulp, and to the bit where PyTorch's own update ran; and ``fastopt_info()`` and the one warning
tell of what ran.
``PYTHONPATH=tests python tests/frameworks/test_torch_sequences.py FIRST LAST`` runs more seeds.
"""

import copy
import inspect
import os
import pickle
import random
import sys
import warnings

import pytest
import torch
import torch_peers
from tables import ROWS
from torch.nn import Parameter
from torch_files import through_a_file

import fastopt
import fastopt.torch

SEEDS = int(os.environ.get("FASTOPT_SEQUENCES", "60"))
LENGTH = 24
ULPS = 64  # of the largest element, or of 1: errors add up over a sequence


class Subclass(torch.Tensor):
    """A tensor that may have an arithmetic of its own."""


# Twelve numbers, as one parameter or as several over the same memory.
LAYOUTS = {
    "a matrix": lambda b: [b.view(3, 4)],
    "two": lambda b: [b[:6].view(2, 3), b[6:].view(3, 2)],
    "no axes": lambda b: [b[0].clone()],
    "no elements": lambda b: [b[:0].view(0, 3)],
    "transposed": lambda b: [b.view(3, 4).t()],
    "channels last": lambda b: [b.view(1, 2, 2, 3).permute(0, 3, 1, 2)],
}
ODD_LAYOUTS = {
    "gaps": lambda b: [b[::2]],
    "negatives": lambda b: [torch.complex(b, b).conj().imag],
    "bfloat16": lambda b: [b.to(torch.bfloat16).view(4, 3)],
    "float16": lambda b: [b.to(torch.float16)],
    "complex": lambda b: [torch.complex(b, -b)],
    "a subclass": lambda b: [b.as_subclass(Subclass)],
    "views": lambda b: [b[:8], b[4:]],
    "a chain of views": lambda b: [b[8:], b[:5], b[4:9]],
    "views of views": lambda b: [b.view(3, 4)[1], b.view(4, 3).t(), b[:1]],
    "the whole and gaps": lambda b: [b[:6], b[::2], b[7:]],
    "tied": lambda b: [b.view(3, 4), b.view(3, 4)],
    "one in the other": lambda b: [b[2:4].view(2), b],
    "real parts": lambda b: [b, torch.view_as_complex(b.view(6, 2))],
    "broadcast": lambda b: [b[:3].expand(2, 3)],
}
HYPERS = {row.name: row.torch_choices for row in ROWS if row.torch}
COMMON = {
    "lr": (0.1, 0.01, 0.5), "weight_decay": (0.0, 0.1), "maximize": (False, True),
    "foreach": (None, False, True),
}  # fmt: skip


class Side:
    """A module with the classes, an optimizer of it, and the parameters."""

    def __init__(self, module):
        self.module = module
        self.params = []
        self.opt = None


class Sequence:
    """A sequence of operations that a seed determines."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.numbers = torch.Generator().manual_seed(seed)
        self.sides = self.theirs, self.ours = Side(torch_peers), Side(fastopt.torch)
        self.name = self.random.choice(list(HYPERS))
        self.log = [self.name]
        # fused=True takes for granted that all is laid out alike, and that all have a gradient.
        signature = inspect.signature(getattr(torch.optim, self.name))
        self.fused = "fused" in signature.parameters and self.random.random() < 0.15
        self.odd = 0.0 if self.fused else self.random.choice((0.0, 0.2, 0.6))
        self.exact = []  # whether PyTorch alone has updated a parameter so far
        self.complained = self.over = self.spoiled = False
        options = self.some_options()
        if self.fused:
            options = {
                **options,
                "foreach": None,
                "fused": True,
                "momentum": 0.0,
                "nesterov": False,
            }
            known = {*COMMON, *HYPERS[self.name], "fused"}
            options = {k: v for k, v in options.items() if k in known}
        self.log.append(options)
        for side, params in zip(self.sides, self.new_params(), strict=True):
            side.params = params
            side.opt = getattr(side.module, self.name)(params, **options)

    # ---- what is drawn ---------------------------------------------------------------------------

    def draw(self, shape, dtype):
        return torch.randn(shape, generator=self.numbers, dtype=torch.float64).to(dtype)

    def some_options(self):
        choices = {**COMMON, **HYPERS[self.name]}
        if self.name == "Rprop":  # which has none
            del choices["weight_decay"]
        chosen = {
            k: self.random.choice(v) for k, v in choices.items() if self.random.random() < 0.4
        }
        if chosen.get("nesterov") and (not chosen.get("momentum") or chosen.get("dampening")):
            chosen["nesterov"] = False
        return chosen

    def new_params(self):
        """Return equal parameters for either side."""
        result = [], []
        for _ in range(self.random.randint(1, 3)):
            layouts = ODD_LAYOUTS if self.random.random() < self.odd else LAYOUTS
            if self.fused:
                layouts = {k: LAYOUTS[k] for k in ("a matrix", "two", "no axes")}
            kind = self.random.choice(list(layouts))
            self.log.append(kind)
            base = self.draw(12, self.random.choice((torch.float32, torch.float64)))
            for params in result:
                params += [
                    p if type(p) is Subclass else Parameter(p) for p in layouts[kind](base.clone())
                ]
        self.exact += [True] * len(result[0])
        order = list(range(len(result[0])))
        self.random.shuffle(order)
        return [[params[i] for i in order] for params in result]

    def new_gradients(self, index):
        """Return equal gradients for either side's parameter, or None."""
        param = self.theirs.params[index]
        kinds = ["dense"] * 6 + ["dense"] if self.fused else (
            ["dense"] * 6 + ["none", "other layout", "broadcast"]
        )  # fmt: skip
        if self.odd:
            kinds += ["negatives", "sparse", "another's", "a subclass"]
        kind = self.random.choice(kinds)
        shape, dtype = param.shape, param.dtype
        grad = self.draw(shape, dtype)
        if kind == "none":
            return None, None
        if kind == "dense":
            like = [torch.empty_like(p) for p in (s.params[index] for s in self.sides)]
            return [g.detach().as_subclass(torch.Tensor).copy_(grad) for g in like]
        if kind == "other layout":
            grad = self.draw(shape[::-1], dtype).permute(tuple(reversed(range(len(shape)))))
        if kind == "broadcast" and len(shape) and param.numel():
            grad = self.draw((1, *shape[1:]), dtype).expand(shape)
        if kind == "negatives" and not dtype.is_complex and dtype.itemsize > 2:
            return [torch.complex(grad, grad).conj().imag for _ in self.sides]
        if kind == "sparse" and len(shape) and param.numel():
            rows = sorted(self.random.sample(range(shape[0]), max(1, shape[0] // 2)))
            values = self.draw((len(rows), *shape[1:]), dtype)
            return [
                torch.sparse_coo_tensor([rows], values.clone(), shape, check_invariants=True)
                for _ in self.sides
            ]
        if kind == "a subclass":
            return [grad.clone().as_subclass(Subclass) for _ in self.sides]
        if kind == "another's" and type(param) is Parameter:
            others = [
                i for i, p in enumerate(self.theirs.params)
                if i != index and p.shape == shape and p.dtype == dtype and type(p) is Parameter
            ]  # fmt: skip
            if others:
                other = self.random.choice(others)
                self.exact = [False] * len(self.exact)
                return [side.params[other].detach() for side in self.sides]
        return [grad.clone() for _ in self.sides]

    # ---- operations ------------------------------------------------------------------------------

    def both(self, operation):
        """Do something to both sides; both raise or neither; tell whether they did not."""
        errors = []
        for side in self.sides:
            try:
                operation(side)
                errors.append(None)
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
                    ValueError) as error:  # fmt: skip
                errors.append(error)
        theirs, ours = errors
        assert type(theirs) is type(ours), (theirs, ours)
        if theirs is not None:
            self.log.append(f"{type(theirs).__name__}: {str(theirs)[:60]}")
        return theirs is None

    def gradients(self):
        for index in range(len(self.theirs.params)):
            for side, grad in zip(self.sides, self.new_gradients(index), strict=True):
                side.params[index].grad = grad

    def step(self):
        self.gradients()
        self.step_with_these()

    def step_again(self):
        if self.spoiled:
            self.gradients()  # PyTorch's have the momentum in them
        self.step_with_these()

    def step_with_these(self):
        groups = self.theirs.opt.param_groups
        self.spoiled = any(group.get("nesterov") and group.get("foreach") for group in groups)
        closure = self.random.random() < 0.2
        factor = self.random.random()

        def step(side):
            def evaluate():
                for param in side.params:
                    if param.grad is not None and param.grad.layout is torch.strided:
                        param.grad = param.grad * factor
                return factor

            assert side.opt.step(evaluate if closure else None) == (factor if closure else None)

        if self.both(step):
            self.check_what_ran()
        else:
            self.complained = self.ours.opt._has_warned
            self.mend()

    def check_what_ran(self):
        opt = self.ours.opt
        params = [p for group in opt.param_groups for p in group["params"]]
        run = opt._run
        kernels = set() if run is None else {id(p) for p in run.params if p.grad is not None}
        ran = {id(p) for p in params if p.grad is not None}
        info = opt.fastopt_info()
        for param, told in zip(params, info, strict=True):
            if param.grad is not None:
                assert told["runs"] == ("fastopt" if id(param) in kernels else "torch"), told
        few = sum(p.numel() for p in params if id(p) in kernels)
        many = sum(p.numel() for p in params if id(p) in ran)
        self.complained |= 2 * few < many
        assert opt._has_warned == self.complained
        for i, param in enumerate(self.ours.params):
            if id(param) in kernels:
                self.exact[i] = False

    def mend(self):
        """Bring both sides to the same numbers after an error: PyTorch's may be half done."""
        if self.has_subclass():
            self.over = True
            return
        for p, q in zip(self.theirs.params, self.ours.params, strict=True):
            p.grad = q.grad = None
            with torch.no_grad():
                if 0 not in p.stride() or p.numel() <= 1:
                    q.detach().copy_(p.detach())
        for group in self.theirs.opt.param_groups:
            group.update({k: v[0] for k, v in HYPERS[self.name].items()})
        self.theirs.opt.state.clear()
        fresh = getattr(torch_peers, self.name)(self.groups_of(self.theirs))
        fresh.param_groups = self.theirs.opt.param_groups
        self.theirs.opt.load_state_dict(fresh.state_dict())
        self.ours.opt.load_state_dict(copy.deepcopy(fresh.state_dict()))

    def zero_grad(self):
        none = self.random.random() < 0.5
        self.both(lambda side: side.opt.zero_grad(set_to_none=none))

    def change_options(self):
        number = self.random.randrange(len(self.theirs.opt.param_groups))
        options = self.some_options()
        if self.fused:
            options = {k: v for k, v in options.items() if k in ("lr", "weight_decay", "eps")}
        if self.theirs.opt.param_groups[number].get("centered"):
            options.pop("centered", None)  # once off, it leaves PyTorch a variance below 0
        for side in self.sides:
            side.opt.param_groups[number].update(options)
        self.log.append(options)

    def change_rate(self):
        factor = self.random.choice((0.5, 2.0))
        for side in self.sides:
            for group in side.opt.param_groups:
                group["lr"] *= factor

    def add_group(self):
        if len(self.theirs.params) > 12:
            return
        options = {} if self.fused else self.some_options()
        for side, params in zip(self.sides, self.new_params(), strict=True):
            side.params = side.params + params
            side.opt.add_param_group({"params": params, **options})

    def has_subclass(self):
        """Tell whether there is a parameter or state that PyTorch neither copies nor loads."""
        states = self.theirs.opt.state.values()
        tensors = [*self.theirs.params, *(t for state in states for t in state.values())]
        return any(type(tensor) is Subclass for tensor in tensors)

    def freeze(self):
        index = self.random.randrange(len(self.theirs.params))
        for side in self.sides:
            side.params[index].requires_grad_(not side.params[index].requires_grad)
            side.params[index].grad = None

    def copy(self):
        if not self.has_subclass() and self.both(self.copy_side):
            self.complained = False

    def copy_side(self, side):
        for param in side.params:
            if type(param.grad) is Subclass:  # which PyTorch does not copy
                param.grad = None
        side.opt, side.params = copy.deepcopy((side.opt, side.params))

    def pickle(self):
        def reload(side):
            side.opt, side.params = pickle.loads(pickle.dumps((side.opt, side.params)))

        if not self.has_subclass() and self.both(reload):
            self.complained = False

    def groups_of(self, side):
        return [{"params": list(group["params"])} for group in side.opt.param_groups]

    def exchange_state(self):
        """Load each other's state dict, by way of a file, into new optimizers or the same."""
        if self.has_subclass():
            return
        new = self.random.random() < 0.5
        loaded = []
        for side in self.sides:
            loaded.append(through_a_file(side.opt.state_dict()))
            if new:
                options = {"fused": True} if self.fused else {}
                side.opt = getattr(side.module, self.name)(self.groups_of(side), **options)
        if new:
            self.complained = False
        for side, state in zip(self.sides, reversed(loaded), strict=True):
            side.opt.load_state_dict(state)

    def change_state(self):
        how = self.random.choice(("scale", "replace", "move", "transpose", "drop", "count"))
        index = self.random.randrange(len(self.theirs.params))
        if how in ("transpose", "drop") and (self.fused or self.name == "Adagrad"):
            return
        for side in self.sides:
            param = side.params[index]
            if param not in side.opt.state:
                continue
            state = side.opt.state[param]
            for key, value in list(state.items()):
                if how == "count" and key == "step":
                    value.fill_(3)
                if value is None or key == "step":
                    continue
                if how == "scale":
                    value.mul_(0.5)
                elif how == "replace":
                    state[key] = value.clone()
                elif how == "move":
                    value.data = value.clone()
                elif how == "transpose" and value.dim() > 1 and not value.is_sparse:
                    state[key] = value.transpose(0, 1).contiguous().transpose(0, 1)
            if how == "drop":
                del side.opt.state[param]

    def move(self):
        index = self.random.randrange(len(self.theirs.params))
        kind = self.random.choice(("clone", "share", "onto another", "gaps", "turn"))
        if self.fused and kind in ("onto another", "gaps", "turn"):
            return
        param = self.theirs.params[index]
        if type(param) is Subclass or param.is_complex() or param.is_neg():
            return
        others = [
            i for i, p in enumerate(self.theirs.params)
            if i != index and p.shape == param.shape and p.dtype == param.dtype
            and type(p) is Parameter and not p.is_neg()
        ]  # fmt: skip
        other = self.random.choice(others) if others else None
        for side in self.sides:
            param = side.params[index]
            if kind == "clone":
                param.data = param.data.clone()
            elif kind == "share":
                param.share_memory_()
            elif kind == "onto another" and other is not None and self.odd:
                param.data = side.params[other].data
            elif kind == "gaps" and self.odd:
                param.data = torch.stack([param.data, param.data], -1)[..., 0]
            elif kind == "turn" and param.dim() == 2:
                param.data = param.data.t().contiguous().t()
        if kind == "onto another" and other is not None:
            self.exact = [False] * len(self.exact)

    OPERATIONS = (
        (step, 10), (step_again, 3), (zero_grad, 2), (change_options, 2), (change_rate, 1),
        (add_group, 1), (freeze, 1), (copy, 1), (pickle, 1), (exchange_state, 1),
        (change_state, 1), (move, 2),
    )  # fmt: skip

    # ---- the run ---------------------------------------------------------------------------------

    def run(self):
        operations, weights = zip(*self.OPERATIONS, strict=True)
        for operation in self.random.choices(operations, weights, k=LENGTH):
            self.log.append(operation.__name__)
            operation(self)
            if self.over:
                break
            self.compare()

    def compare(self):
        for i, (p, q) in enumerate(zip(self.theirs.params, self.ours.params, strict=True)):
            exact = self.exact[i]
            self.compare_tensors(q, p, exact, f"parameter {i}")
            theirs, ours = self.theirs.opt.state.get(p), self.ours.opt.state.get(q)
            assert (theirs or {}).keys() == (ours or {}).keys(), i
            for key in theirs or {}:
                if theirs[key] is None:
                    assert ours[key] is None
                else:
                    alike = exact or key == "step"
                    self.compare_tensors(ours[key], theirs[key], alike, f"{key} of {i}")

    def compare_tensors(self, ours, theirs, exact, what):
        assert ours.dtype == theirs.dtype, what
        assert ours.shape == theirs.shape, what
        ours, theirs = (t.detach().to_dense() for t in (ours, theirs))
        ours, theirs = (t.as_subclass(torch.Tensor).resolve_neg() for t in (ours, theirs))
        if exact or not theirs.numel():
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), what
            return
        largest = float(theirs.nan_to_num().abs().max())
        atol = ULPS * torch.finfo(theirs.dtype).eps * max(largest, 1.0)
        assert torch.allclose(ours, theirs, rtol=0, atol=atol, equal_nan=True), (
            f"{what}: {float((ours - theirs).abs().max())} > {atol}"
        )


def run(seed):
    sequence = None
    try:
        sequence = Sequence(seed)
        sequence.run()
    except Exception as error:
        log = [] if sequence is None else sequence.log
        raise AssertionError(f"seed {seed}: {error!r} after {log}") from error


@pytest.mark.filterwarnings("ignore::fastopt.FallbackWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's own, of sparse tensors and others
@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_random_sequences_do_what_torch_optim_does(first):
    for seed in range(first, min(first + 10, SEEDS)):
        run(seed)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    failed = 0
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        try:
            run(seed)
        except AssertionError as error:
            failed += 1
            print(error, flush=True)
    print(f"{failed} of {int(sys.argv[2]) - int(sys.argv[1])} seeds failed")
    sys.exit(failed > 0)
