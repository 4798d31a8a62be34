"""Break the C core in one place at a time, and demand that the tests notice.

    python tests/mutate.py [--list] [--only K ...]

Each mutation is applied to a temporary copy of the repository, built there with the compiler and
the interpreter at hand, and handed to the tests of the core (of the threads, first to the stress in
C, which does what takes luck elsewhere; of what Python cannot reach, to the check of the driver in
C). They must fail (not: crash, hang or find nothing to run). A mutation whose text is no longer in
its file, or that does not compile, is an error too: it has to follow the code.

Every statement of a rule's update is mutated, and every constant that it uses: these are found in
the rule's header, so that a new rule needs no line here.
"""

import argparse
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "src_c"
TESTS = [  # the quick ones first: most mutations are caught in seconds
    "contract",
    "model",
    "c_api",
    "state",
    "properties",
    "accumulate",
    "golden",
    "errors",
    "accuracy",
    "rprop",
    "bitwise",
    "storage",
    "c_storage",
    "c_rows",
    "rows",
    "rows_exact",
    "rowwise",
    "parts",
]
THREAD_TESTS = ["bitwise", "environment", "processes"]
TESTS_OF = {"errors.h": ["c_api"], "rules.c": ["c_api"]}  # instead
TESTS_OF |= {file: ["c_api", "c_storage", "c_rows", "rowwise"] for file in ("api.c", "arrays.h")}
TESTS_OF |= {"reduce.c": ["parts"]}
TESTS_OF |= {file: ["storage"] for file in ("codecs.inc", "fused.inc", "random.h")}
TESTS_OF |= {file: ["rows", "rows_exact", "c_rows"] for file in ("rows.c", "missed.c")}
TESTS_OF |= dict.fromkeys(["team.c", "team.h", "region.c"], THREAD_TESTS)
WORKERS = min(2, os.cpu_count() or 1)
HANGS_AFTER = 900  # seconds; all tests of the core take a third of it on a slow machine
BUILT: dict[Path, str] = {}  # the source of each object, as the compiler's preprocessor left it


class Mutation(NamedTuple):
    """In `file`, `old`, which occurs there once, becomes `new`."""

    breaks: str
    file: str
    old: str
    new: str
    in_c: bool = False  # the checks of the driver have to notice, with the type that is for tests


def of_rules() -> list[Mutation]:
    """Break each constant and each statement with arithmetic in the headers of the rules."""
    mutations = []
    for rule in re.findall(r"^FO_RULE\((\w+),", (CORE / "rules.def").read_text(), re.MULTILINE):
        file = f"rules/{rule}.h"
        constants, update = (CORE / file).read_text().split("#else")
        found = len(mutations)
        for line in re.findall(r"^ +(k\[\w+\] = .+;)$", constants, re.MULTILINE):
            constant, value = line[:-1].split(" = ", 1)
            broken = f"{constant} = 1 + ({value});"
            mutations.append(Mutation(f"{rule}: {constant} is off by one", file, line, broken))
        for line in re.findall(r"^ +(\S.+;)$", update, re.MULTILINE):
            for old, new in ((" - ", " + "), (" + ", " - "), (" * ", " + ")):
                if old in line:
                    breaks = f"{rule}: {new.strip()} in place of {old.strip()} in '{line}'"
                    mutations.append(Mutation(breaks, file, line, line.replace(old, new, 1)))
                    break
        if len(mutations) - found < 3:
            raise RuntimeError(f"found too little to break in {file}")
    return mutations


MUTATIONS = [
    *of_rules(),
    Mutation(
        "SGD: the momentum's constant is another's",
        "rules/sgd.h",
        "k[SGD_MU] * slot[0]",
        "k[SGD_IN] * slot[0]",
    ),
    Mutation(
        "SGD: the first step is not told apart",
        "rules/sgd.h",
        "semantics == FO_TORCH && (t == 1 || (fresh & FO_SLOT(0)))",
        "semantics == FO_TORCH && t == 0",
    ),
    Mutation(
        "SGD: Nesterov does not look ahead",
        "rules/sgd.h",
        "h->nesterov != 0 || h->momentum == 0 ? h->lr : 0",
        "h->momentum == 0 ? h->lr : 0",
    ),
    Mutation(
        "SGD: Keras's velocity has the wrong sign",
        "rules/sgd.h",
        "-(h->lr * damped)",
        "(h->lr * damped)",
    ),
    Mutation(
        "Adagrad: the learning rate decays a step early",
        "rules/adagrad.h",
        "(double)(t - 1)",
        "(double)t",
    ),
    Mutation(
        "Adagrad: Keras's eps is outside the root",
        "rules/adagrad.h",
        "(slot[0] + k[ADAGRAD_EPS_IN]) +",
        "(slot[0]) + k[ADAGRAD_EPS_IN] +",
    ),
    Mutation(
        "Adagrad: squares are not accumulated",
        "rules/adagrad.h",
        "slot[0] = slot[0] + g * g;",
        "slot[0] = g * g;",
    ),
    Mutation(
        "RMSprop: the floor of the centered variance is gone",
        "rules/rmsprop.h",
        "keras ? -INFINITY : 0",
        "-INFINITY",
    ),
    Mutation(
        "RMSprop: the learning rate goes into torch's buffer",
        "rules/rmsprop.h",
        "lr_goes_in = keras || h->momentum == 0",
        "lr_goes_in = true",
    ),
    Mutation(
        "NAdam: Keras's momentum warms up as PyTorch's",
        "rules/nadam.h",
        "semantics == FO_KERAS ? 1 : h->momentum_decay",
        "h->momentum_decay",
    ),
    Mutation(
        "NAdam: the exponent is one double",
        "rules/nadam.h",
        "((y - n) + y_rest)",
        "(y - n)",
    ),
    Mutation(
        "NAdam: the step ahead has this step's momentum",
        "rules/nadam.h",
        "nadam_momentum(h->beta1, psi, t + 1)",
        "nadam_momentum(h->beta1, psi, t)",
    ),
    Mutation(
        "a rule's number stays as it was",
        "step.c",
        "if (!add && number >= 0)",
        "if (!add && number > FO_MAX_SLOTS)",
    ),
    Mutation(
        "a rule's number moves on while gradients are summed",
        "step.c",
        "if (!add && number >= 0)",
        "if (number >= 0)",
    ),
    Mutation(
        "parameters share constants whatever their numbers are",
        "step.c",
        " || c->number != number",
        "",
    ),
    Mutation(
        "RAdam: the rectification begins at another length",
        "rules/radam.h",
        "rho > 5",
        "rho > 6",
    ),
    Mutation(
        "RAdam: eps is corrected like Adam's",
        "rules/radam.h",
        "k[RADAM_EPS] = rectified ? h->eps : 0",
        "k[RADAM_EPS] = rectified ? h->eps * sqrt(c2) : 0",
    ),
    Mutation(
        "RAdam: the length is that of the average of gradients",
        "rules/radam.h",
        "radam_length(h->beta2, t)",
        "radam_length(h->beta1, t)",
    ),
    Mutation(
        "RAdam: a small power is what rounding has left of 1",
        "rules/radam.h",
        "q = u < 0.5 ? 1 - u : q * q",
        "q = 1 - u",
    ),
    Mutation(
        "Rprop: an element does not rest where its gradient has changed its sign",
        "rules/rprop.h",
        "slot[0] = x < 0 ? 0 : g;",
        "slot[0] = g;",
    ),
    Mutation(
        "Rprop: a step size has no largest",
        "rules/rprop.h",
        "slot[1] = large > k[RPROP_MAX] ? k[RPROP_MAX] : large;",
        "slot[1] = large;",
    ),
    Mutation(
        "Rprop: a step size that has become zero begins again",
        "rules/rprop.h",
        "h->lr > 0 ? 0x1p-149 : 0",
        "0",
    ),
    Mutation(
        "Rprop: a step size stays at zero where the rate is zero, too",
        "rules/rprop.h",
        "h->lr > 0 ? 0x1p-149 : 0",
        "0x1p-149",
    ),
    Mutation(
        "Rprop: a step size of NaN becomes the smallest",
        "rules/rprop.h",
        "s < k[RPROP_MIN] ? k[RPROP_MIN] : s;",
        "s >= k[RPROP_MIN] ? s : k[RPROP_MIN];",
    ),
    Mutation(
        "Adam: the root is missing",
        "rules/adam.h",
        "FO_T(fo_sqrt)(v)",
        "(v)",
    ),
    Mutation(
        "Adam: the second moment's step counter is frozen",
        "rules/adam.h",
        "fo_one_minus_power(h->beta2, t)",
        "fo_one_minus_power(h->beta2, 1)",
    ),
    Mutation(
        "Adam: the betas' constants are swapped",
        "rules/adam.h",
        "k[ADAM_ONE_MINUS_BETA1] = 1 - h->beta1;",
        "k[ADAM_ONE_MINUS_BETA1] = 1 - h->beta2;",
    ),
    Mutation(
        "Adam: torch's eps is added before the bias correction",
        "rules/adam.h",
        "semantics == FO_KERAS ? h->eps : h->eps * sqrt(c2)",
        "h->eps",
    ),
    Mutation(
        "Adam: no bias correction",
        "rules/adam.h",
        "h->lr * sqrt(c2) / c1",
        "h->lr",
    ),
    Mutation(
        "Adam: AMSGrad forgets the maximum",
        "rules/adam.h",
        "v = slot[2] = FO_T(fo_max)(slot[2], v)",
        "slot[2] = v",
    ),
    Mutation(
        "Adam: another order of the multiplications, so another rounding",
        "rules/adam.h",
        "k[ADAM_ONE_MINUS_BETA2] * (g * g)",
        "(k[ADAM_ONE_MINUS_BETA2] * g) * g",
    ),
    Mutation(
        "Adadelta: the divisor is the average before this step",
        "rules/adadelta.h",
        "    slot[0] = k[ADADELTA_RHO] * slot[0] + k[ADADELTA_ONE_MINUS_RHO] * (g * g);\n"
        "    const T root = FO_T(fo_sqrt)(slot[1] + k[ADADELTA_EPS]);\n"
        "    const T delta = root / FO_T(fo_sqrt)(slot[0] + k[ADADELTA_EPS]) * g;\n",
        "    const T root = FO_T(fo_sqrt)(slot[1] + k[ADADELTA_EPS]);\n"
        "    const T delta = root / FO_T(fo_sqrt)(slot[0] + k[ADADELTA_EPS]) * g;\n"
        "    slot[0] = k[ADADELTA_RHO] * slot[0] + k[ADADELTA_ONE_MINUS_RHO] * (g * g);\n",
    ),
    Mutation(
        "Adadelta: the product is rounded before the quotient, as in keras",
        "rules/adadelta.h",
        "root / FO_T(fo_sqrt)(slot[0] + k[ADADELTA_EPS]) * g",
        "root * g / FO_T(fo_sqrt)(slot[0] + k[ADADELTA_EPS])",
    ),
    Mutation(
        "Lion: the sign is that of the momentum after this step",
        "rules/lion.h",
        "k[LION_BETA1] * slot[0] + (1 - k[LION_BETA1]) * g;\n"
        "    slot[0] = k[LION_BETA2] * slot[0] + (1 - k[LION_BETA2]) * g;\n",
        "k[LION_BETA1] * (k[LION_BETA2] * slot[0] + (1 - k[LION_BETA2]) * g);\n"
        "    slot[0] = k[LION_BETA2] * slot[0] + (1 - k[LION_BETA2]) * g;\n",
    ),
    Mutation(
        "Lion: the sign of 0 is 1",
        "rules/lion.h",
        "x > 0 ? k[LION_LR] : down",
        "x >= 0 ? k[LION_LR] : down",
    ),
    Mutation(
        "1 - beta^t: even powers only",
        "rule.h",
        "if (t >> bit & 1)",
        "if (0)",
    ),
    Mutation(
        "decoupled decay: the learning rate is left out",
        "rules.c",
        "1 - h->lr * h->weight_decay",
        "1 - h->weight_decay",
    ),
    Mutation(
        "decoupled decay comes after the update",
        "loop.inc",
        "p = k[KEEP] * p;\n    return FO_T(RULE)(p, g, slot, k, variant);",
        "return k[KEEP] * FO_T(RULE)(p, g, slot, k, variant);",
    ),
    Mutation(
        "clipping by value has no lower limit",
        "typed.inc",
        "FO_T(fo_at_least)(-gmax, g)",
        "g",
    ),
    Mutation(
        "coupled decay comes before clipping",
        "typed.inc",
        "g = gscale * g;",
        "g = gscale * g + l2 * (T)(gmax < 1 ? p : 0);",
    ),
    Mutation(
        "norm: the last element is skipped",
        "passes.inc",
        "i + j < n; j++) {\n        const T x = scaled",
        "i + j < n - 1; j++) {\n        const T x = scaled",
    ),
    Mutation(
        "norm: the lanes are added in another order",
        "update.c",
        "sum[j] += sum[j + half];",
        "sum[j] += sum[2 * half - 1 - j];",
    ),
    Mutation(
        "an infinity counts as finite",
        "passes.inc",
        "if (x - x != 0)",
        "if (x != x)",
    ),
    Mutation(
        "average: its two weights are swapped",
        "passes.inc",
        "decay * ema[i] + rest * param[i]",
        "rest * ema[i] + decay * param[i]",
    ),
    Mutation(
        "the last, incomplete block is skipped",
        "rows.h",
        "size / FO_BLOCK + (size % FO_BLOCK != 0)",
        "size / FO_BLOCK",
    ),
    Mutation(
        "a block ends one element early",
        "step.c",
        "left < most ? left : most",
        "left < most ? left : most - 1",
    ),
    Mutation(
        "a load leaves the bytes as they are stored",
        "codecs.inc",
        "float_of(__builtin_bswap32(bits))",
        "float_of(bits)",
        in_c=True,
    ),
    Mutation(
        "a store leaves the bytes as they are computed",
        "codecs.inc",
        "__builtin_bswap32(bits_of(x))",
        "bits_of(x)",
        in_c=True,
    ),
    Mutation(
        "only the first element is decoded",
        "kernels.c",
        "load_##name(from + i * (bytes))",
        "load_##name(from)",
        in_c=True,
    ),
    Mutation(
        "elements are encoded to one place",
        "kernels.c",
        "store_##name(to + i * (bytes), from[i], false, 0)",
        "store_##name(to, from[i], false, 0)",
        in_c=True,
    ),
    Mutation(
        "what is decoded is the beginning of an array",
        "plan.h",
        "(const char *)a->data + (size_t)offset * fo_storages[a->dtype].bytes",
        "(const char *)a->data",
        in_c=True,
    ),
    Mutation(
        "what is encoded goes to the beginning of an array",
        "plan.h",
        "(char *)a->data + (size_t)offset * item;",
        "(char *)a->data;",
        in_c=True,
    ),
    Mutation(
        "random bits depend on half of their key",
        "random.h",
        " + (uint32_t)(key >> 32);",
        ";",
    ),
    Mutation(
        "random bits are the same for all elements",
        "random.h",
        "pair * UINT32_C(0x9e3779b9)",
        "0 * pair",
    ),
    Mutation(
        "state is rounded by the parameter's random bits",
        "random.h",
        "return hash << 16 | hash >> 16;",
        "return hash;",
    ),
    Mutation(
        "random bits are the same at every step",
        "coded.c",
        "fo_key(key, w->step)",
        "fo_key(key, 1)",
    ),
    Mutation(
        "random bits are the same for all parameters",
        "coded.c",
        "coding->index);",
        "0);",
    ),
    Mutation(
        "loops that are made for a storage round to nearest",
        "coded.c",
        "stochastic != 0, fo_key(",
        "false, fo_key(",
    ),
    Mutation(
        "what is beside an array is taken from its beginning",
        "plan.h",
        "(size_t)(offset / storage->per) * storage->beside",
        "0 * (size_t)offset",
    ),
    Mutation(
        "bfloat16: ties are rounded up",
        "codecs.inc",
        "0x7fff + (bits >> 16 & 1); /* ties to even */",
        "0x8000;",
    ),
    Mutation(
        "bfloat16: a NaN may become an infinity",
        "codecs.inc",
        "x != x ? FO_NAN : bits + (stochastic",
        "bits + (stochastic",
    ),
    Mutation(
        "trailing bits count beside a parameter that others have set to zero",
        "codecs.inc",
        "pick(whole <= FO_INF, whole, size)",
        "pick(size == 0 || whole <= FO_INF, whole, size)",
    ),
    Mutation(
        "bfloat16 with trailing bits: ties are rounded towards zero",
        "codecs.inc",
        "bits_of(x) + 0x8000;",
        "bits_of(x) + 0x7fff;",
    ),
    Mutation(
        "float16: a master outlives what others have written",
        "codecs.inc",
        "pick(rounded, bits_of(beside[i])",
        "pick(rounded || 1, bits_of(beside[i])",
    ),
    Mutation(
        "8 bits: small state that is never negative may vanish",
        "codecs.inc",
        "least((int32_t)(bits & FO_ABS), 1)",
        "0",
    ),
    Mutation(
        "8 bits: a block's largest value may round up to infinity's code",
        "codecs.inc",
        "MARGIN_U8 = 0x2fffff",
        "MARGIN_U8 = 0",
    ),
    Mutation(
        "8 bits: small values are not evenly spaced",
        "codecs.inc",
        "least((int32_t)bits_of(a), (int32_t)bits_of(even))",
        "(int32_t)bits_of(a)",
    ),
    Mutation(
        "8 bits: small values are stored as zeros",
        "codecs.inc",
        "most(normal, (int32_t)((whole + r16) >> 16))",
        "most(normal, 0)",
    ),
    Mutation(
        "loops that are made for a storage take the second of two elements for the first",
        "fused.inc",
        "float_of(two & 0xffff0000)",
        "float_of(two << 16)",
    ),
    Mutation(
        "the last of four arrays has the random bits of the third",
        "random.h",
        "return hash << 24 | hash >> 8;",
        "return hash << 8 | hash >> 24;",
        in_c=True,
    ),
    Mutation(
        "random bits do not depend on the upper half of an element's index",
        "kernels.c",
        "fo_key(key, element >> 32)",
        "fo_key(key, 0)",
        in_c=True,
    ),
    Mutation(
        "elements 2^32 apart have other numbers among those with their key",
        "kernels.c",
        "(uint32_t)element / 2 + (uint32_t)j",
        "(uint32_t)(element / 2) + (uint32_t)j",
        in_c=True,
    ),
    Mutation(
        "an odd element takes the random bits of the one before it",
        "kernels.c",
        "(const half *)bits + odd",
        "(const half *)bits",
        in_c=True,
    ),
    Mutation(
        "random bits go on past 2^32 elements under the same key",
        "kernels.c",
        "n - done < left ? n - done : left",
        "n - done",
        in_c=True,
    ),
    Mutation(
        "all elements of an array are rounded by the first one's random bits",
        "kernels.c",
        "from[i], true, random[i])",
        "from[i], true, random[0])",
    ),
    Mutation(
        "loops that are made for bfloat16 are taken where it has trailing bits",
        "coded.c",
        "t->dtype.of.param == types[k][0]",
        "fo_storages[t->dtype.of.param].bytes == fo_storages[types[k][0]].bytes",
    ),
    Mutation(
        "state that stays exact has no loops that are made for a storage",
        "coded.c",
        "(needs[j] & EXACT ? FO_F32 : types[k][2])",
        "types[k][2]",
        in_c=True,
    ),
    Mutation(
        "loops that are made for a storage are taken for a gradient of another type",
        "coded.c",
        " && t->dtype.of.grad == types[k][1]",
        "",
    ),
    Mutation(
        "loops that are made for a storage are taken for a gradient that is laid out otherwise",
        "coded.c",
        "if (t->grad_ndim != 0 || t->sum)",
        "if (t->sum)",
        in_c=True,
    ),
    Mutation(
        "loops that are made for a storage take one gradient for the sum of several",
        "coded.c",
        "if (t->grad_ndim != 0 || t->sum)",
        "if (t->grad_ndim != 0)",
    ),
    Mutation(
        "loops that are made for a storage begin with the second of two elements",
        "coded.c",
        "!fused || element % 2 != 0",
        "!fused",
        in_c=True,
    ),
    Mutation(
        "loops that are made for a storage go on past 2^32 elements under the same key",
        "coded.c",
        "    n = n < left ? n : left;\n",
        "",
        in_c=True,
    ),
    Mutation(
        "loops that are made for a storage have one key for all elements",
        "coded.c",
        "fo_key(key, upper)",
        "fo_key(key, 0)",
        in_c=True,
    ),
    Mutation(
        "loops that are made for a storage round all arrays at random if one is to be",
        "coded.c",
        "stochastic != random && stochastic != 0",
        "stochastic > random",
        in_c=True,
    ),
    Mutation(
        "loops that are made for a storage leave out an element that is alone",
        "coded.c",
        "    n -= n % 2;\n",
        "",
    ),
    Mutation(
        "loops that are made for a storage take the first block's scales",
        "coded.c",
        "beside_at(&a, offset)};",
        "beside_at(&a, 0)};",
    ),
    Mutation(
        "what such loops leave takes the gradient from the beginning",
        "coded.c",
        "offset += done, at += done)",
        "offset += done)",
    ),
    Mutation(
        "random bits do not depend on the first element's index",
        "coded.c",
        "coding->first + offset);",
        "offset);",
        in_c=True,
    ),
    Mutation(
        "loops that are made for a storage do not know of the first element's index",
        "coded.c",
        "element = coding->first + offset, upper",
        "element = offset, upper",
        in_c=True,
    ),
    Mutation(
        "an array is rounded at random where any other is",
        "coded.c",
        "coding->stochastic & FO_SLOT(j) ? random[j]",
        "coding->stochastic ? random[j]",
    ),
    Mutation(
        "loops that are made for a storage have the same random bits in each block",
        "fused.inc",
        "fo_hash(key, element / 2 + (uint32_t)j)",
        "fo_hash(key, (uint32_t)j)",
    ),
    Mutation(
        "two elements have each other's random bits",
        "fused.inc",
        "h ? random >> 16 : random & 0xffff",
        "h ? random & 0xffff : random >> 16",
    ),
    Mutation(
        "loops that are made for a storage round a slot by another's random bits",
        "fused.inc",
        "store_pair(type1, &s1, j, t1, stochastic, fo_bits_for(hash, 2));",
        "store_pair(type1, &s1, j, t1, stochastic, fo_bits_for(hash, 1));",
    ),
    Mutation(
        "trailing bits of the second element are not signed",
        "fused.inc",
        "(int32_t)lower >> 16",
        "(int32_t)(lower >> 16)",
    ),
    Mutation(
        "bfloat16 is never rounded at random",
        "codecs.inc",
        "bits + (stochastic ? random : half_up)",
        "bits + half_up",
    ),
    Mutation(
        "trailing bits make a NaN of an infinity that others have written",
        "codecs.inc",
        "pick(whole <= FO_INF, whole, size)",
        "pick((int32_t)whole >= 0, whole, size)",
    ),
    Mutation(
        "a NaN has trailing bits",
        "codecs.inc",
        "(from[i] == from[i] ? bits_of(from[i]) : 0)",
        "bits_of(from[i])",
    ),
    Mutation(
        "float16: ties are rounded up",
        "codecs.inc",
        "0xfff + (size >> 13 & 1)",
        "0x1000",
    ),
    Mutation(
        "float16: random bits count double",
        "codecs.inc",
        "r13 = random >> 3",
        "r13 = random >> 2",
    ),
    Mutation(
        "float16: subnormals are rounded to nearest where they are to be at random",
        "codecs.inc",
        "(small * 0x1p40f) + random) >> 16",
        "(small * 0x1p40f) + 0x8000) >> 16",
    ),
    Mutation(
        "float16: the largest numbers that round up to infinity do not",
        "codecs.inc",
        "pick(size >= 0x47800000, 0x7c00, finite)",
        "pick(size >= FO_INF, 0x7c00, finite)",
    ),
    Mutation(
        "float16: a NaN that is stored may become an infinity",
        "codecs.inc",
        "return pick(size > FO_INF, 0x7e00, code);",
        "return code;",
    ),
    Mutation(
        "float16: a master that is negative is lost",
        "codecs.inc",
        "f16_of_float(beside[i], false, 0) == from[i]",
        "f16_of_float(beside[i], false, 0) == (uint32_t)(from[i] & 0x7fff)",
    ),
    Mutation(
        "8 bits: what is not finite makes a block's scale",
        "codecs.inc",
        "largest_size(n, from, true)",
        "largest_size(n, from, false)",
    ),
    Mutation(
        "8 bits: tiny blocks are scaled by a power of two that there is not",
        "codecs.inc",
        "largest >= FO_INF || scale < 149 - (BASE)",
        "largest >= FO_INF",
    ),
    Mutation(
        "8 bits: a block with an infinity is taken for finite",
        "codecs.inc",
        "largest >= FO_INF || scale",
        "largest > FO_INF || scale",
    ),
    Mutation(
        "8 bits with sign: a block's largest value may round up to infinity's code",
        "codecs.inc",
        "MARGIN_S8 = 0x1fffff",
        "MARGIN_S8 = 0",
    ),
    Mutation(
        "8 bits with sign: blocks have a larger scale than they need",
        "codecs.inc",
        "MARGIN_S8 = 0x1fffff",
        "MARGIN_S8 = 0x2fffff",
    ),
    Mutation(
        "8 bits: a zero with a sign becomes a NaN",
        "codecs.inc",
        "((code + 0x7f) & (bits >> 24) & 0x80)",
        "(bits >> 24 & 0x80)",
    ),
    Mutation(
        "8 bits: a NaN without sign is stored as an infinity",
        "codecs.inc",
        "size > FO_INF ? NAN_U8 : ",
        "size > FO_INF ? INF_U8 : ",
    ),
    Mutation(
        "8 bits: an infinity without sign is stored as a number",
        "codecs.inc",
        "size == FO_INF ? INF_U8 : code",
        "code",
    ),
    Mutation(
        "8 bits: an infinity with sign is stored as a number",
        "codecs.inc",
        "    if (size < FO_INF)\n        return code;\n",
        "    if (size <= FO_INF)\n        return code;\n",
    ),
    Mutation(
        "8 bits: a NaN with sign is stored as an infinity",
        "codecs.inc",
        "size > FO_INF ? NAN_S8 : (",
        "(",
    ),
    Mutation(
        "8 bits: a NaN without sign is loaded as an infinity",
        "codecs.inc",
        "code == NAN_U8 ? float_of(FO_NAN) : code == INF_U8",
        "code >= INF_U8",
    ),
    Mutation(
        "8 bits: an infinity with sign is loaded as a number",
        "codecs.inc",
        "(code & 0x7f) == INF_S8 ? float_of(FO_INF | (code & 0x80) << 24) : value",
        "value",
    ),
    Mutation(
        "8 bits: a NaN with sign is loaded as a zero",
        "codecs.inc",
        "    if (code == NAN_S8)\n        return float_of(FO_NAN);\n",
        "",
    ),
    Mutation(
        "8 bits: a block with an infinity alone is loaded as finite",
        "codecs.inc",
        "largest >= INF_U8;",
        "largest > INF_U8;",
    ),
    Mutation(
        "8 bits: a block with a NaN alone is loaded as finite",
        "codecs.inc",
        " || from[i] == NAN_S8",
        "",
    ),
    Mutation(
        "8 bits: small scales are taken for others",
        "codecs.inc",
        "k < -126 ? 1u << (k + 149) : (uint32_t)(k + 127) << 23",
        "(uint32_t)(k + 127) << 23",
    ),
    Mutation(
        "8 bits: random bits count for half",
        "codecs.inc",
        "(r16 << 4)",
        "(r16 << 3)",
    ),
    Mutation(
        "8 bits: all blocks have the random bits of the first",
        "codecs.inc",
        "from + i, random + i)",
        "from + i, random)",
    ),
    Mutation(
        "8 bits: the last, incomplete block has the scale of none",
        "codecs.inc",
        "*scales = store_##type(n - i",
        "store_##type(n - i",
    ),
    Mutation(
        "what needs no encoding is not put back",
        "plan.h",
        "else if (elements != at)",
        "else if (elements == at)",
        in_c=True,
    ),
    Mutation(
        "a tensor whose state alone is encoded is taken for one that is not",
        "plan.h",
        "t->dtype.all != 0 && written.all != fo_one_dtype(type).all",
        "written.of.param != type",
        in_c=True,
    ),
    Mutation(
        "a gradient that is laid out otherwise is not decoded",
        "gradient.c",
        "t->grad_ndim != 0 ? gathered : in_place",
        "in_place",
        in_c=True,
    ),
    Mutation(
        "every stretch takes the first one's gradient",
        "coded.c",
        "offset += FO_STRETCH, at += FO_STRETCH) {",
        "offset += FO_STRETCH) {",
        in_c=True,
    ),
    Mutation(
        "a stretch ends one element early",
        "coded.c",
        "end - offset < FO_STRETCH ? end - offset : FO_STRETCH;",
        "end - offset < FO_STRETCH ? end - offset : FO_STRETCH - 1;",
        in_c=True,
    ),
    Mutation(
        "the next stretch begins one element late",
        "coded.c",
        "offset < end; offset += FO_STRETCH, at",
        "offset < end; offset += FO_STRETCH + 1, at",
        in_c=True,
    ),
    Mutation(
        "state is not encoded again",
        "coded.c",
        "if (elements[j])\n                put(s, &a",
        "if (elements[j] && j == 0)\n                put(s, &a",
        in_c=True,
    ),
    Mutation(
        "an average's stretch ends one element early",
        "update.c",
        "end - offset < most ? end - offset : most;",
        "end - offset < most ? end - offset : most - (most < n);",
        in_c=True,
    ),
    Mutation(
        "a piece's first element is left out",
        "plan.c",
        "p->begin = added->offset;",
        "p->begin = added->offset + (added->offset > 0 && added->size > 0);",
        in_c=True,
    ),
    Mutation(
        "a piece's last element is left out",
        "plan.c",
        "p->end = added->offset + added->size;",
        "p->end = added->offset + added->size - (added->offset > 0 && added->size > 0);",
        in_c=True,
    ),
    Mutation(
        "a gradient lies where its parameter does",
        "plan.c",
        "added->grad - added->offset;",
        "0;",
        in_c=True,
    ),
    Mutation(
        "a piece's later blocks begin where its tensor's do",
        "step.c",
        "p->begin + (block - first[k]) * FO_BLOCK",
        "(block > first[k] ? 0 : p->begin) + (block - first[k]) * FO_BLOCK",
        in_c=True,
    ),
    Mutation(
        "the norm of a tensor in pieces is each piece's",
        "step.c",
        "if (k + 1 < plan->n_pieces && p[1].tensor == p->tensor)",
        "if (k + 1 < 0)",
        in_c=True,
    ),
    Mutation(
        "the norm of a tensor includes those before it",
        "step.c",
        "        sum = 0;\n",
        "        sum += 0;\n",
    ),
    Mutation(
        "gradients are scanned where their parameters lie",
        "update.c",
        "    const int64_t at = offset + p->to_grad;\n    if (!has",
        "    const int64_t at = offset;\n    if (!has",
        in_c=True,
    ),
    Mutation(
        "a sum takes the gradient of other elements",
        "gradient.c",
        "fo_read_grad(s, t, at, n, buffer) : NULL",
        "fo_read_grad(s, t, offset, n, buffer) : NULL",
        in_c=True,
    ),
    Mutation(
        "the gradient of other elements is zeroed",
        "update.c",
        "fo_zero_grad(t, at, n);",
        "fo_zero_grad(t, offset, n);",
        in_c=True,
    ),
    Mutation(
        "blocks that do not divide among the threads are skipped",
        "team.h",
        "(n % members < rank ? n % members : rank)",
        "0",
    ),
    Mutation(
        "a thread leaves its range when it has taken from it once",
        "team.c",
        "if (begin >= m->end)",
        "if (begin >= m->end || worked)",
    ),
    Mutation(
        "a forked child waits for its parent's OpenMP threads",
        "team.c",
        "(crew->layer == FO_OPENMP && forked)",
        "false",
    ),
    Mutation(
        "a forked child waits for the program's pool of its parent",
        "team.c",
        "forked ? NULL : crew->pool",
        "crew->pool",
    ),
    Mutation(
        "an OpenMP region updates what its first pass has refused",
        "region.c",
        "if (second_follows)",
        "if (second_follows || rank > 0)",
    ),
    Mutation(
        "threads of an OpenMP region update before all have read",
        "region.c",
        "#pragma omp barrier\n            if (rank == 0)",
        "            if (rank == 0)",
    ),
    Mutation(
        "OpenMP gets as many threads as pay",
        "step.c",
        "crew.layer == FO_OPENMP && useful > 1 ? crew.members : (int)useful",
        "(int)useful",
    ),
    Mutation(
        "a forked child waits for its parent's team",
        "team.c",
        "    team.workers = 0;\n",
        "",
    ),
    Mutation(
        "workers take the program's signals",
        "team.c",
        "sigfillset",
        "sigemptyset",
    ),
    Mutation(
        "a fault in a worker is not reported",
        "team.c",
        "sigdelset(&all, faults[i]);",
        "(void)faults[i];",
    ),
    Mutation(
        "a forked child comes to a gate that its parent left open",
        "team.c",
        "    atomic_store(&team.gate, 0);\n",
        "",
    ),
    Mutation(
        "a forked child finds its parent's team in use",
        "team.c",
        "    pthread_mutex_init(&team.used, NULL);\n",
        "",
    ),
    Mutation(
        "a strided gradient's outermost axis stands still",
        "gradient.c",
        "for (int axis = last - 1; axis >= 0; axis--)",
        "for (int axis = last - 1; axis > 0; axis--)",
    ),
    Mutation(
        "a strided gradient is read from the wrong place in later blocks",
        "gradient.c",
        "first /= t->grad_shape[axis];",
        "first /= 1;",
    ),
    Mutation(
        "torch's clip factor lacks its 1e-6",
        "step.c",
        "limit / (norm + 1e-6)",
        "limit / norm",
    ),
    Mutation(
        "Keras's common norm may be infinite",
        "step.c",
        "(inverse < most ? inverse : most) + (norm - norm)",
        "(inverse < most ? inverse : most)",
    ),
    Mutation(
        "Keras's common clip factor is its array's",
        "step.c",
        "args->semantics == FO_KERAS && args->clip == FO_GLOBAL_CLIP_NORM",
        "args->semantics == FO_KERAS && args->clip == FO_NO_CLIP",
    ),
    Mutation(
        "Keras's clip factor amplifies",
        "step.c",
        "(norm > limit || norm != norm ? norm : limit)",
        "norm",
    ),
    Mutation(
        "maximize is ignored",
        "step.c",
        "c->maximize ? -scale : scale",
        "c->maximize ? scale : scale",
    ),
    Mutation(
        "constants are shared by parameters of different step counts",
        "step.c",
        "c->step != *t->step || c->fresh != t->fresh || ",
        "c->fresh != t->fresh || ",
    ),
    Mutation(
        "constants are shared by buffers that have begun and that have not",
        "step.c",
        "c->step != *t->step || c->fresh != t->fresh || ",
        "c->step != *t->step || ",
    ),
    Mutation(
        "a buffer that starts late takes the gradient dampened",
        "rules/sgd.h",
        "(t == 1 || (fresh & FO_SLOT(0)))",
        "t == 1",
    ),
    Mutation(
        "constants are shared by different groups",
        "step.c",
        "group_work *c = &plan->group_works[t->group];",
        "group_work *c = &plan->group_works[0];",
    ),
    Mutation(
        "the first average is no copy",
        "update.c",
        "if (s->args->ema_starts)",
        "if (s->args->ema_starts && n == 0)",
    ),
    Mutation(
        "a skipped step that zeroes gradients updates",
        "update.c",
        "} else if (part) {",
        "} else if (has_gradient(s, t)) {",
    ),
    Mutation(
        "a refused step zeroes gradients",
        "step.c",
        "(s->args->nonfinite == FO_SKIP && s->args->zero_grad)",
        "s->args->zero_grad",
    ),
    Mutation(
        "step counters do not advance",
        "step.c",
        "++*t->step;",
        "(void)t->step;",
    ),
    Mutation(
        "counters of parameters without a gradient advance",
        "step.c",
        "if (!has_gradient(s, t))\n            continue;\n        if (!add && begins)\n",
        "if (!add && begins)\n",
    ),
    Mutation(
        "state stands still where the first elements are done apart",
        "update.c",
        "(char *)slot[j] + (size_t)head * item",
        "(char *)slot[j]",
    ),
    Mutation(
        "the program's own pool is never tried",
        "step.c",
        "if (choice == TUNER_POOL)",
        "if (0)",
    ),
    Mutation(
        "the mean over micro-batches is their sum",
        "passes.inc",
        "to[i] = (sum[i] + scale * grad[i]) / divisor;",
        "to[i] = sum[i] + scale * grad[i];",
    ),
    Mutation(
        "the mean of what came before a None is their sum",
        "passes.inc",
        "to[i] = sum[i] / divisor;",
        "to[i] = sum[i];",
    ),
    Mutation(
        "sums keep what has been used",
        "step.c",
        "t->has_sum = add;",
        "t->has_sum = true;",
    ),
    Mutation(
        "a micro-batch that is skipped enters the sums",
        "update.c",
        "if (part && s->args->add) {",
        "if (has_gradient(s, t) && s->args->add) {",
    ),
    Mutation(
        "a parameter without a gradient in the last micro-batch is left out",
        "plan.h",
        "return t->grad || t->row_size || (t->has_sum && !s->args->add);",
        "return t->grad != NULL;",
    ),
    Mutation(
        "averages follow micro-batches",
        "update.c",
        "if (t->ema && !s->result->skipped && !s->args->add)\n",
        "if (t->ema && !s->result->skipped)\n",
    ),
    Mutation(
        "sums are scaled twice",
        "plan.h",
        "return t->sum ? 1 : s->scale;",
        "return s->scale;",
    ),
    Mutation(
        "subnormals are flushed if the caller flushes them",
        "platform.h",
        "_mm_setcsr(0x1F80);",
        "_mm_setcsr(saved);",
    ),
    Mutation(
        "Adam: a default is not the class's",
        "rules/adam.h",
        "X(beta2, 0.999,",
        "X(beta2, 0.99,",
    ),
    Mutation(
        "C interface: a NaN is taken for a hyperparameter",
        "rules.c",
        "return value >= rule->lows[j] && value <= rule->highs[j];",
        "return !(value < rule->lows[j] || value > rule->highs[j]);",
    ),
    Mutation(
        "C interface: Adam's beta may be 1",
        "rules/adam.h",
        "X(beta1, 0.9, 0, FO_BELOW_1)",
        "X(beta1, 0.9, 0, 1)",
    ),
    Mutation(
        "C interface: an array of another type than its parameter's is taken",
        "arrays.h",
        "return storage->arithmetic == arithmetic &&",
        "return storage->arithmetic <= arithmetic &&",
    ),
    Mutation(
        "C interface: state that has to stay exact may be of fewer bits",
        "arrays.h",
        "role >= 0 && fo_rule_slot_exact(rule, role)",
        "role >= 0 && !rule",
    ),
    Mutation(
        "C interface: what is never negative is stored with a sign",
        "arrays.h",
        "? FO_8BIT_UNSIGNED : FO_8BIT_SIGNED",
        "? FO_8BIT_SIGNED : FO_8BIT_SIGNED",
    ),
    Mutation(
        "C interface: 8-bit state may lack its scales",
        "arrays.h",
        "bits8 && !a->scales && t->size > 0",
        "bits8 && !a->scales && t->size < 0",
    ),
    Mutation(
        "C interface: an array's rounding is not looked at where the rest is usual",
        "arrays.h",
        "| a->seed | last[0] | last[1]) == 0",
        "| a->seed | last[1]) == 0",
    ),
    Mutation(
        "C interface: a master is forgotten",
        "api.c",
        "if (!param->master)",
        "if (param->master || !param->master)",
    ),
    Mutation(
        "C interface: random bits do not depend on the parameter's number",
        "api.c",
        ".index = i};",
        ".index = 0};",
    ),
    Mutation(
        "C interface: state is rounded as the parameter is",
        "api.c",
        "note_rounding(opt, i, 1 + j, state);",
        "note_rounding(opt, i, 0, state);",
    ),
    Mutation(
        "C interface: state that was rounded at random goes on so as another array",
        "api.c",
        "coding->stochastic &= ~FO_SLOT(number);",
        "",
    ),
    Mutation(
        "C interface: the sums of a resumed run are forgotten",
        "api.c",
        "t->has_sum = holds != 0;",
        "t->has_sum = false;",
    ),
    Mutation(
        "C interface: what a new hyperparameter needs is not noticed",
        "api.c",
        "[j] = value;\n    note_needs(opt, group);\n",
        "[j] = value;\n",
    ),
    Mutation(
        "C interface: a struct of another size is taken",
        "errors.h",
        "if (size != right)",
        "if (size > right)",
    ),
    Mutation(
        "C interface: a loss scale of 0 is not 1",
        "options.h",
        "o->loss_scale != 0 ? o->loss_scale : 1",
        "o->loss_scale",
    ),
    Mutation(
        "C interface: averages never start",
        "options.h",
        "o->ema_starts != 0",
        "false",
    ),
    Mutation(
        "C interface: a counter may be negative",
        "api.c",
        "*t->step < 0 || *t->step == INT64_MAX",
        "*t->step == INT64_MAX",
    ),
    Mutation(
        "C interface: a gradient that is not finite is no error",
        "api.c",
        "args.nonfinite == FO_RAISE)",
        "args.nonfinite == FO_SKIP)",
    ),
    Mutation(
        "C interface: an error is every thread's",
        "errors.h",
        "static _Thread_local char error",
        "static char error",
    ),
    Mutation(
        "C interface: a parameter keeps the state of the one before it",
        "api.c",
        "(fo_tensor){.param = param->data,",
        "(fo_tensor){.slot = {fo_plan_tensor(opt->plan, i)->slot[0]}, .param = param->data,",
    ),
    # ---- gradients of some rows
    Mutation(
        "rows: a negative row is taken",
        "rows.c",
        "if (row < 0 || row >= n_rows)",
        "if (row >= n_rows)",
    ),
    Mutation(
        "rows: the row after the last is taken",
        "rows.c",
        "row >= n_rows)",
        "row > n_rows)",
    ),
    Mutation(
        "rows: the order of those of one row is lost in a short sort",
        "rows.c",
        "rows[k - 1].row > moved.row",
        "rows[k - 1].row >= moved.row",
    ),
    Mutation(
        "rows: the order of those of one row is lost in a long sort",
        "rows.c",
        "shift == 0 ? (fo_row){indices[i], i} : from[i];",
        "shift == 0 ? (fo_row){indices[n - 1 - i], n - 1 - i} : from[i];",
    ),
    Mutation(
        "rows: sorted rows are left in the spare array",
        "rows.c",
        "rows->sorted = to;",
        "rows->sorted = shift == 0 ? to : rows->spare;\n        rows->spare = to;",
    ),
    Mutation(
        "rows: a digit is counted where another one is",
        "rows.c",
        "moved.row >> shift >> width & mask",
        "moved.row >> shift >> (width - 1) & mask",
    ),
    Mutation(
        "rows: the highest bit of their number is not sorted by",
        "rows.c",
        "while ((n_rows - 1) >> bits)",
        "while ((n_rows - 1) >> bits >> 1)",
    ),
    Mutation(
        "rows: each row that is given is a distinct one",
        "rows.c",
        "sorted[i].row != sorted[i - 1].row",
        "sorted[i].row >= sorted[i - 1].row",
    ),
    Mutation(
        "rows: a block is listed once more for each of its rows",
        "rows.c",
        "n_blocks += last >= next;",
        "n_blocks += last >= next - 1;",
    ),
    Mutation(
        "rows: the block that a row ends in is left out",
        "rows.c",
        "last = (begin + size - 1) / FO_BLOCK",
        "last = begin / FO_BLOCK",
    ),
    Mutation(
        "rows: blocks without a row are not averaged",
        "rows.c",
        "for (; tensor->ema && next < all; next++)",
        "for (; tensor->ema && next < 0; next++)",
    ),
    Mutation(
        "rows: the sum of those of one row misses the last",
        "update.c",
        "for (const int64_t first = given->at; ++given < end;) {",
        "for (const int64_t first = given->at; ++given < end - 1;) {",
    ),
    Mutation(
        "rows: a run goes on over rows that are given twice",
        "update.c",
        "first[r.next + 1] - first[r.next] == 1 &&",
        "first[r.next + 1] - first[r.next] >= 1 &&",
    ),
    Mutation(
        "rows: a run goes on over rows that are left out",
        "update.c",
        "given[1].row == given->row + 1 &&",
        "given[1].row >= given->row + 1 &&",
    ),
    Mutation(
        "rows: a row's squares are added from the first lane on",
        "update.c",
        "scale, (r.begin - begin) % FO_LANES, sums);",
        "scale, 0, sums);",
    ),
    Mutation(
        "rows: a NaN in a row is overlooked",
        "update.c",
        "finite = finite && s->table->all_finite[w->type](n, grad, scale);",
        "finite = finite || s->table->all_finite[w->type](n, grad, scale);",
    ),
    Mutation(
        "rows: of a row that is given twice one gradient is zeroed",
        "update.c",
        "for (int64_t i = rows->first[r->k]; i < rows->first[r->next]; i++)",
        "for (int64_t i = rows->first[r->k]; i < rows->first[r->k] + 1; i++)",
    ),
    Mutation(
        "rows: a gradient beside 8-bit state may share scales",
        "api.c",
        "t->row_size % FO_SCALED != 0)",
        "t->row_size % FO_SCALED == FO_SCALED)",
    ),
    Mutation(
        "rows: the number of a step that was missed is the last one's",
        "update.c",
        "w.step = m->step;",
        "w.step = now->step;",
    ),
    Mutation(
        "rows: the constants of a step that was missed are the last one's",
        "update.c",
        "w.consts = m->consts;",
        "w.consts = s->plan->consts;",
    ),
    Mutation(
        "row-wise: a row's sum loses what it was",
        "rules/adagrad.h",
        "*sum = *sum + mean;",
        "*sum = mean;",
    ),
    Mutation(
        "row-wise: the sum of squares is not divided",
        "update.c",
        "fold(sums) / (double)t->width",
        "fold(sums)",
    ),
    Mutation(
        "row-wise: the mean is of gradients without decay",
        "passes.inc",
        "FO_T(add_own)(n, param, grad, (T)consts[L2], (T)gscale, (T)gmax, sum, false);",
        "FO_T(add_own)(n, param, grad, 0, (T)gscale, (T)gmax, sum, false);",
    ),
    Mutation(
        "row-wise: the last elements of a row do not count",
        "passes.inc",
        "    for (int j = 0; i + j < n; j++) {\n        const T x = FO_T(fo_own_gradient)",
        "    for (int j = 0; i + j < n - 1; j++) {\n        const T x = FO_T(fo_own_gradient)",
    ),
    Mutation(
        "parts: the norm is that of the first parameter",
        "step.c",
        "args->squares[p->tensor - plan->tensors]",
        "args->squares[0]",
    ),
    Mutation(
        "parts: a norm that is given is not used",
        "step.c",
        "    if (args->squares)\n        resolve_clipping(&s);\n",
        "",
    ),
    Mutation(
        "parts: blocks without a gradient are as they were",
        "step.c",
        "        plan->block_finite[b] = true;\n",
        "",
    ),
    Mutation(
        "means: the last one is added first",
        "reduce.c",
        "for (int k = 0; k < count; k++) {",
        "for (int j = 0, k = 0; j < count; j++, k = count - j) {",
    ),
    Mutation(
        "means: the sum is not divided",
        "reduce.c",
        "sum, sum, NULL, 1, count);",
        "sum, sum, NULL, 1, 1);",
    ),
    Mutation(
        "row-wise: every row has the first one's sum",
        "update.c",
        "(size_t)(row->begin / t->width) * w->item",
        "(size_t)(row->begin / t->width) * 0",
    ),
    Mutation(
        "row-wise: rows that begin before a block are updated with it",
        "update.c",
        "fo_distinct_row(rows, k) * t->width < begin)",
        "fo_distinct_row(rows, k) * t->width < 0)",
    ),
    Mutation(
        "row-wise: a row catches up in every block that it reaches",
        "update.c",
        "if (row * size >= begin)",
        "if (row * size < end)",
    ),
    Mutation(
        "row-wise: the C interface takes rows of another size for the gradient",
        "api.c",
        "if (t->width != 0 && t->width != t->row_size)",
        "if (t->width != 0 && t->row_size == 0)",
    ),
    Mutation(
        "rows: a factor of a step that was missed is the last one's",
        "update.c",
        "w.gscale = m->gscale;",
        "w.gscale = now->gscale;",
    ),
    Mutation(
        "rows: rows rest whose slots are not zero",
        "update.c",
        "while (j < log->n && at_zero && log->steps[j % FO_ROW_LOG].rests)",
        "while (j < log->n && log->steps[j % FO_ROW_LOG].rests)",
    ),
    Mutation(
        "rows: rows rest though weights decay",
        "missed.c",
        "if (w->consts[L2] != 0 || w->consts[KEEP] != 1)",
        "if (w->consts[KEEP] != 1)",
    ),
    Mutation(
        "rows: rows rest though weights decay, decoupled",
        "missed.c",
        "if (w->consts[L2] != 0 || w->consts[KEEP] != 1)",
        "if (w->consts[L2] != 0)",
    ),
    Mutation(
        "rows: no step that was missed is logged if rows would rest at zero",
        "missed.c",
        "if (rests && fo_rule_slots_stay(s->plan->rule, w->variant))",
        "if (rests)",
    ),
    Mutation(
        "rows: those that have a gradient take its step once more",
        "missed.c",
        "            t->log->taken[fo_distinct_row(w->rows, k)] = (uint16_t)t->log->n;\n",
        "            t->log->taken[fo_distinct_row(w->rows, k)] = (uint16_t)before;\n",
    ),
    Mutation(
        "rows: those that catch up in turn are too few",
        "missed.c",
        "log->n_rows / (FO_ROW_LOG - 1) + 1;",
        "log->n_rows / (8 * FO_ROW_LOG) + 1;",
    ),
    Mutation(
        "rows: none catches up in turn",
        "missed.c",
        "            sweep(s, t, crew);\n",
        "            (void)sweep, (void)crew;\n",
    ),
    Mutation(
        "rows: a gradient of some rows takes all of the row before",
        "missed.c",
        "from + FO_BLOCK < t->size ? from + FO_BLOCK : t->size;",
        "t->size;",
    ),
]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a copy."""
    # Teams are larger than the machine here, and two copies run at once: waiting must not cost.
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(folder)}
    return subprocess.run(
        command,
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANGS_AFTER,
    )


def checked_run(folder: Path, *command: str) -> str:
    """Run a command in a copy and return what it printed; raise with that if it fails."""
    done = run(folder, *command)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout}")
    return done.stdout


def build(folder: Path) -> list[list[str]]:
    """Build the extension of a copy; return the commands that build the C core and link it."""
    output = checked_run(folder, sys.executable, "setup.py", "build_ext", "--inplace")
    commands = [shlex.split(line) for line in output.splitlines() if " -o build" in line]
    core = [command for command in commands if "fastopt/_core.c" not in command]
    core = [command for command in core if not any("_tensors" in part for part in command)]
    # The bits do not depend on it, and the compiler is done in half of the time.
    return [["-O1" if part == "-O3" else part for part in command] for command in core]


def rebuild(folder: Path, commands: list[list[str]]) -> None:
    """Build again what a mutation has changed, which the bridge to Python is not."""
    for command in commands:
        place = command.index("-o")
        made = folder / command[place + 1]
        if "-c" in command:
            rest = [part for part in (*command[:place], *command[place + 2 :]) if part != "-c"]
            source = checked_run(folder, *rest, "-E", "-P")
            if BUILT.get(made) == source:
                continue
        checked_run(folder, *command)
        if "-c" in command:
            BUILT[made] = source
    linked = commands[-1][commands[-1].index("-o") + 1]
    if not Path(linked).name.startswith("_core."):
        raise RuntimeError(f"the last command of the build makes {linked}, not the core")
    shutil.copy2(folder / linked, folder / "fastopt")


def test(folder: Path, names: Sequence[str]) -> tuple[int, str]:
    """Run some of the tests in a copy: pytest's exit code, and what it printed."""
    files = [str(p) for name in names for p in folder.glob(f"tests/*/test_{name}.py")]
    pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    done = run(folder, *pytest, *files)
    return done.returncode, done.stdout


def stress_of_threads(folder: Path) -> str:
    """Run tests/c/team_check.c in a copy: '' if it passes, or what it found."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = ["-std=c11", "-O2", "-fopenmp", "-Isrc_c", "-Ifastopt/include"]
    sources = ["src_c/team.c", "tests/c/team_check.c"]
    linked = ["-Wl,--wrap=pthread_create", "-lm", "-o", "team_check"]
    checked_run(folder, *compiler, *flags, *sources, *linked)
    done = run(folder, "./team_check", "1", "3")
    if done.returncode and "team_check: " not in done.stdout:
        raise RuntimeError(f"team_check died (exit code {done.returncode}):\n{done.stdout}")
    return done.stdout if done.returncode else ""


def checks_of_driver(folder: Path) -> str:
    """Run the checks that print a digest in a copy: '' if they pass, or what one found."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = ["-std=c11", "-O1", "-ffp-contract=off", "-fno-math-errno", "-DFO_TEST_STORAGE"]
    flags += ["-DFO_ISA=base", "-Wno-unknown-pragmas", "-Isrc_c", "-Ifastopt/include"]
    sources = [f"src_c/{path.name}" for path in sorted((folder / "src_c").glob("*.c"))]
    checked_run(folder, *compiler, *flags, "-c", *sources)
    objects = [f"{Path(source).stem}.o" for source in sources]
    for name in ("driver_check", "storage_check", "rows_check", "parts_check"):
        wrap = ["-Wl,--wrap=fo_active_table"] if name == "storage_check" else []
        linked = [f"tests/c/{name}.c", *objects, *wrap, "-lm", "-o", name]
        checked_run(folder, *compiler, *flags, *linked)
        done = run(folder, f"./{name}", "few")
        if done.returncode and "digest" not in done.stdout:
            raise RuntimeError(f"{name} died (exit code {done.returncode}):\n{done.stdout}")
        if done.returncode:
            return f"{name}: {done.stdout}"
    return ""


def copy_repository(to: Path) -> None:
    """Copy what a build and the tests need, without anything built."""
    ignored = shutil.ignore_patterns("*.so", "_core.c", "_tensors.c", "__pycache__")
    for name in ("fastopt", "src_c", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, to / name)


def check_unmutated(folder: Path, names: Sequence[str]) -> None:
    """Make sure that a copy's tests, and the checks in C, pass and are about it."""
    import_it = "import fastopt; print(fastopt.__file__)"
    found = checked_run(folder, sys.executable, "-c", import_it).strip()
    if not Path(found).is_relative_to(folder):
        raise RuntimeError(f"the tests would import {found}")
    code, output = test(folder, names)
    if problem := stress_of_threads(folder) or checks_of_driver(folder):
        raise RuntimeError(f"a check in C fails without a mutation:\n{problem}")
    if code:
        raise RuntimeError(f"the tests fail without a mutation (exit code {code}):\n{output}")


def tests_of(mutation: Mutation) -> list[str]:
    """Return the tests to run, those first that are of what the mutation breaks."""
    first = {"row-wise": "rowwise", "rows": "rows", "parts": "parts"}.get(
        mutation.breaks.partition(":")[0], ""
    )
    return sorted(TESTS_OF.get(mutation.file, TESTS), key=lambda name: name != first)


def outcome(mutation: Mutation, folder: Path, commands: list[list[str]]) -> tuple[bool, str]:
    """Apply a mutation to a copy, test, undo it; tell whether it was caught, and what happened."""
    path = folder / "src_c" / mutation.file
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return False, f"the text occurs {text.count(mutation.old)} times in {mutation.file}"
    try:
        path.write_text(text.replace(mutation.old, mutation.new))
        if mutation.in_c:
            found = checks_of_driver(folder)
            return bool(found), f"caught by {found.partition(':')[0]}" if found else "NOT CAUGHT"
        if mutation.file in ("team.c", "team.h") and stress_of_threads(folder):
            return True, "caught by team_check"
        rebuild(folder, commands)
        code, output = test(folder, tests_of(mutation))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    finally:
        path.write_text(text)
    failed = re.search(r"^FAILED (\S+)", output, re.MULTILINE)
    if code == 1 and failed:
        return True, f"caught by {failed[1]}"
    if -code in (signal.SIGABRT, signal.SIGSEGV):
        return True, f"caught: {signal.Signals(-code).name} ended the tests"
    return False, f"NOT CAUGHT: pytest's exit code is {code}\n{output[-2000:] if code else ''}"


def main() -> int:
    """Apply the mutations; return 0 if all were caught."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="list the mutations, and do nothing")
    parser.add_argument(
        "--only", type=int, metavar="K", nargs="+", help="apply these numbers of the list alone"
    )
    args = parser.parse_args()
    chosen = list(enumerate(MUTATIONS, 1))
    if args.only is not None:
        chosen = [entry for entry in chosen if entry[0] in args.only]
    if args.list:
        for number, mutation in chosen:
            print(f"{number:3} {mutation.file:16} {mutation.breaks}")
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        # Real paths: the tests' own are compared with them.
        folders = [Path(temporary).resolve() / str(i) for i in range(WORKERS)]
        copy_repository(folders[0])
        commands = build(folders[0])
        rebuild(folders[0], commands)
        used = {name for _, m in chosen for name in tests_of(m)}
        check_unmutated(folders[0], sorted(used))
        print("unmutated: the tests pass", flush=True)
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        free.put(folders[0])
        for folder in folders[1:]:
            shutil.copytree(folders[0], folder)
            free.put(folder)

        def apply(entry: tuple[int, Mutation]) -> bool:
            number, mutation = entry
            folder = free.get()
            began = time.monotonic()
            try:
                caught, what = outcome(mutation, folder, commands)
            finally:
                free.put(folder)
            seconds = time.monotonic() - began
            line = f"{number:3} {mutation.file:16} {mutation.breaks} ({seconds:.0f} s)"
            print(f"{line}: {what}", flush=True)
            return caught

        with ThreadPoolExecutor(WORKERS) as workers:
            caught = list(workers.map(apply, chosen))
    print(f"{len(chosen)} mutations, {sum(caught)} caught")
    for number, mutation in (entry for entry, was in zip(chosen, caught, strict=True) if not was):
        print(f"not caught: {number} {mutation.file} {mutation.breaks}")
    return 0 if all(caught) and caught else 1


if __name__ == "__main__":
    sys.exit(main())
