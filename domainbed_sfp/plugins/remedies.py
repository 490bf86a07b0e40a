"""What usually lies behind a check of the contract that fails, and mends it."""

from __future__ import annotations

# By the names of `contract.CHECKS`.
MENDS: dict[str, str] = {
    "updates_lower_the_loss": (
        "update() must train on the batches it gets (zero_grad, backward, step) and return a dict of finite "
        "numbers with 'loss' among them; if it trains too timidly, mind the default of hparam 'lr' and of "
        "schedules, which must take their fractions from self.total_steps"
    ),
    "predict_gives_logits": (
        "predict() returns logits [N, num_classes], works for a single image and writes nothing: keep counters and "
        "statistics out of it, and BatchNorm in the mode that train() and eval() set"
    ),
    "hparams_are_json": (
        "defaults and samples must be plain numbers, words or booleans, no numpy scalars or tuples: wrap a draw in "
        "int(...), float(...) or bool(...)"
    ),
    "deepcopy": (
        "keep no reference to modules or optimizers outside the object (globals, class attributes, closures); what "
        "hooks need goes through self"
    ),
    "exact_resume": (
        "all that changes while training must be a parameter, a buffer, an optimizer that is an attribute, or part "
        "of get_extra_state() and set_extra_state(): step counters and moving averages above all"
    ),
    "deterministic": (
        "draw from torch's, numpy's or python's global generators, which are seeded before every step, never from "
        "one of your own seeded by the clock or the system; do not rely on the order of a set"
    ),
    "degenerate_batches": (
        "guard divisions and logarithms (clamp the denominator), and statistics of one sample: std and var of it "
        "are NaN with unbiased=True"
    ),
    "masks": (
        "masks() returns bool tensors named and shaped as parameters; zero the dead weights after every optimizer "
        "step (Adam's moments move them); sparsity() counts from the same masks; at_final_compression() is True "
        "once they no longer change, before the last step; final_step() says the same step beforehand, or None"
    ),
    "export": (
        "export() returns a deep copy of the network that predict runs, in evaluation mode, with the masks applied; a "
        "channel is out only where masks() has the weights that read it as well as those that write it"
    ),
    "never_touches_the_test_environment": (
        "learn from the minibatches of update() and the batches of prepare_evaluation() alone: predict() sees the "
        "test environment and must leave no trace"
    ),
}
