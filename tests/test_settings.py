"""Settings and devices that mean nothing are refused; what importing utils.py gives and leaves."""

import math

import numpy as np
import pytest
import torch
from helpers import fresh_process, input_error, outcome

import utils

# ---- Settings

SWEEP = dict(K_list=[0, 2], alpha_list=[0], seeds=[0], num_iterations=5, threshold=0.0)
MEANINGLESS = {
    "num_iterations": [-1, 1.5, True, "5", None, math.nan, 2**32],
    "K_list": [[], [1, 1], 3, [1.5], [-1], None, "12"],
    "alpha_list": [[math.nan], [-1.0], [math.inf], [1e16], [1, 1.0], ["1"], 5],
    "seeds": [[-1], [0, 0], []],
    "threshold": [-0.1, 1.1, math.nan],
}


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name, values in MEANINGLESS.items() for value in values],
    ids=str,
)
def test_a_setting_of_a_sweep_without_a_meaning_is_refused_by_name(name, value):
    with input_error(name, repr(value) if not isinstance(value, list) else ""):
        utils.check_sweep(**{**SWEEP, name: value})


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, "0.1", True], ids=str)
def test_a_learning_rate_without_a_meaning_is_refused(value):
    with input_error("learning_rate", repr(value)):
        utils.check_training(5, learning_rate=value)


def test_the_message_names_the_setting_its_value_and_the_bounds():
    with input_error("trials: 0; give a whole number from 1 to 4294967295"):
        utils.check_whole("trials", 0, 1)
    with input_error("num_shots: 1.5; give a whole number from 1 to 4294967295"):
        utils.check_whole_numbers("num_shots", [1.5], 1)
    with input_error("threshold: nan; give a number from 0 to 1"):
        utils.check_number("threshold", math.nan, 0, 1)
    with input_error("fractions: []; give a list of one value or more"):
        utils.check_numbers("fractions", [], 0, 1)
    with input_error("fractions: [0.5, 0.5]; give each value once"):
        utils.check_numbers("fractions", [0.5, 0.5], 0, 1)


def test_settings_that_mean_something_pass():
    utils.check_sweep(range(3), np.array([0, 0.5]), (0, 1), np.int64(5), threshold=1)
    utils.check_training(0, np.float32(0.1), seed=None)
    utils.check_whole_numbers("num_shots", [5, 10], 1)


# ---- Devices


@pytest.mark.parametrize("device", ["cuda:99", "no device", 1.5, [], "meta:x"], ids=str)
def test_a_device_that_is_not_there_is_refused(device):
    with input_error("device", str(device), "cpu"):
        utils.check_device(device)


def test_the_cpu_is_always_there():
    assert utils.check_device("cpu") == torch.device("cpu")
    assert utils.check_device(torch.device("cpu")) == torch.device("cpu")


# ---- Importing utils.py

RELEASED_NAMES = """
    np torch nn optim F random device run run_regularized run_few_shot_vary_shots LoRe
    LoRe_regularized PersonalizeBatch solve solve_regularized solve_regularized_simplex
    learn_multiple_few_shot learn_multiple learn_single_reward learn_single_reward_regularized
    evaluate_model eval_multiple sample_shots simulate_user simulate_population
    generate_population generate_popupulation create_sparse_tensor create_dataset_prism
    create_dataset_prism_shots
"""
OUR_NAMES = "Pairs InputError sweep Fit check_features check_matrix check_whole"


def test_star_import_gives_every_public_name_and_prints_nothing():
    code = """
import sys
from utils import *
sys.exit(repr([name for name in sys.argv[1:] if name not in globals()]))
"""
    assert not {"time", "datetime", "glob"} & set(utils.__all__)  # names of a script's own
    names = f"{RELEASED_NAMES} {OUR_NAMES}".split()
    status, out, err = outcome(fresh_process(code, *names))
    assert (out, err) == ("", "[]\n")


def test_importing_utils_changes_no_signal_handler_and_no_global_setting():
    """An interrupt in a notebook stops the cell, not the kernel."""
    code = """
import signal, warnings
import numba, numpy, pandas, pydantic, safetensors.torch, torch, tqdm, torch.distributed

def settings():
    return (
        [signal.getsignal(number) for number in signal.valid_signals()],
        list(warnings.filters),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        numba.get_num_threads(),
    )

settings()  # numba starts its threads at the first question, and torch then counts others
before = settings()
import utils
assert settings() == before
"""
    status, _, err = outcome(fresh_process(code))
    assert status == 0, err
