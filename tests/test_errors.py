"""A step that fails changes nothing, and every error says what was wrong with what."""

import re

import numpy as np
import pytest
from failures import BAD_HYPERS, INF, KINDS, NAN
from support import (
    CONFIGS,
    EVERY,
    NOT_EMPTY,
    Run,
    change_in_place,
    clean_finish,
    differences,
    everything,
    finish,
)

import fastopt
from fastopt import _core

CLASSES = [fastopt.SGD, fastopt.Adagrad, fastopt.RMSprop, fastopt.Adam, fastopt.AdamW]

# ---- what is promised of all of them -------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_failed_step_leaves_every_byte_as_it_was(name):
    spoil, error, message, where, configs, options = KINDS[name]
    ran = 0
    for config in configs:
        for k in where:
            run = Run(config, **options)
            names = {"key": repr(run.keys[k]), "group": run.group_number(k)}
            names["label"] = re.escape(f"parameter {run.keys[k]!r}")
            with spoil(run, k):
                before = run.everything()
                with pytest.raises(error, match=message.format(**names)) as caught:
                    run.step(run.grads, **run.options)
                assert caught.type is error
                assert differences(run.everything(), before) == []
            assert differences(finish(run), clean_finish(config, options.get("owned", False))) == []
            ran += 1
    assert ran == len(configs) * len(where) > 0


def test_the_table_reaches_every_tensor_in_every_way():
    for k in EVERY:
        reaching = [kind for kind in KINDS.values() if k in kind.where and len(kind.where) > 2]
        assert len(reaching) >= (20 if k in NOT_EMPTY else 15)
    assert {kind.error for kind in KINDS.values()} == {
        TypeError,
        ValueError,
        FloatingPointError,
        ZeroDivisionError,
    }
    assert len(KINDS) > 180
    assert sum(len(kind.where) * len(kind.configs) for kind in KINDS.values()) > 2000
