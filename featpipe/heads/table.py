"""The table of heads: what there is, for which task, and with which settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal

from featpipe.errors import ConfigError
from featpipe.names import unknown

__all__ = ["TABLE", "TASKS", "HeadSpec", "Task", "build", "describe", "names"]

Task = Literal["classification", "regression", "multilabel"]
TASKS: tuple[Task, ...] = ("classification", "regression", "multilabel")


@dataclass(frozen=True)
class HeadSpec:
    """One row of the table.

    Attributes
    ----------
    summary : str
        One sentence for people who choose.
    estimators : mapping of task to str
        "module:Class" for each task that the head does; imported when it is built.
    fixed : mapping of task to mapping
        Settings that follow from the task and are not for the user.
    """

    summary: str
    estimators: Mapping[Task, str]
    fixed: Mapping[Task, Mapping[str, object]]


_MULTILABEL: Mapping[Task, Mapping[str, object]] = {
    "classification": {"multilabel": False},
    "multilabel": {"multilabel": True},
}

TABLE: dict[str, HeadSpec] = {
    "logistic": HeadSpec(
        summary="softmax logistic regression with an L2 penalty, solved exactly; strength C",
        estimators={
            "classification": "featpipe.heads.softmax:SoftmaxRegression",
            "multilabel": "featpipe.heads.softmax:SoftmaxRegression",
        },
        fixed=_MULTILABEL,
    ),
    "mlp": HeadSpec(
        summary="multi-layer perceptron, trained by minibatches; layers hidden, epochs, dropout, early_stopping",
        estimators={
            "classification": "featpipe.heads.torch_heads:MLPClassifier",
            "regression": "featpipe.heads.torch_heads:MLPRegressor",
            "multilabel": "featpipe.heads.torch_heads:MLPClassifier",
        },
        fixed=_MULTILABEL,
    ),
    "linear": HeadSpec(
        summary="one linear layer, trained by minibatches; epochs, learning_rate, weight_decay",
        estimators={
            "classification": "featpipe.heads.torch_heads:LinearClassifier",
            "regression": "featpipe.heads.torch_heads:LinearRegressor",
            "multilabel": "featpipe.heads.torch_heads:LinearClassifier",
        },
        fixed=_MULTILABEL,
    ),
}


def names(task: str | None = None) -> list[str]:
    """The heads that do a task, in the order of the table; all of them without one.

    Examples
    --------
    >>> names("regression")
    ['mlp', 'linear']
    """
    if task is None:
        return list(TABLE)
    known = _task(task)
    return [name for name, spec in TABLE.items() if known in spec.estimators]


def describe(name: str) -> str:
    """One sentence on a head.

    Examples
    --------
    >>> describe("linear")
    'one linear layer, trained by minibatches; epochs, learning_rate, weight_decay'
    """
    return _spec(name).summary


def build(
    name: str,
    task: str = "classification",
    *,
    params: Mapping[str, object] | None = None,
    random_state: int | None = 0,
) -> Any:
    """An unfitted head that standardises its input: a scikit-learn Pipeline of the steps "scale" and "head".

    Parameters
    ----------
    name : str
        A name of the table.
    task : {"classification", "regression", "multilabel"}
    params : mapping, optional
        Settings of the head by name (``C``), or of the pipeline in scikit-learn's notation (``scale__with_mean``,
        or ``scale`` itself with "passthrough").
    random_state : int or None
        For heads that draw random numbers.

    Raises
    ------
    ConfigError
        If the head or a setting is unknown, does not do the task, or is out of range.

    Examples
    --------
    >>> build("logistic", params={"C": 10}).named_steps["head"].C
    10
    """
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    spec, known_task = _spec(name), _task(task)
    if known_task not in spec.estimators:
        raise ConfigError(
            f"head {name!r} does {' and '.join(spec.estimators)}, not {task}; take {' or '.join(names(task))}"
        )
    fixed = dict(spec.fixed.get(known_task, {}))
    head = _load(spec.estimators[known_task])()
    settable = head.get_params(deep=False).keys()
    head.set_params(**{key: value for key, value in fixed.items() if key in settable})
    if "random_state" in settable:
        head.set_params(random_state=random_state)
    pipeline = Pipeline([("scale", StandardScaler()), ("head", head)])
    known = sorted(key for key in pipeline.get_params() if "__" in key or key == "scale")
    known = [key for key in known if key.removeprefix("head__") not in fixed]
    pipeline.set_params(**_addressed(params or {}, known, name))
    if hasattr(head, "check_params"):
        try:
            head.check_params()
        except ValueError as error:
            raise ConfigError(f"head {name!r}: {error}") from None
    return pipeline


def _addressed(params: Mapping[str, object], known: list[str], name: str) -> dict[str, object]:
    """Settings under their names in the pipeline."""
    short = {key.removeprefix("head__"): key for key in known}
    addressed = {}
    for key, value in params.items():
        target = short.get(key, key)
        if target not in known:
            near = get_close_matches(key, short, n=1, cutoff=0.5)
            meant = f", did you mean {near[0]!r}?" if near else ";"
            raise ConfigError(f"head {name!r} has no setting {key!r}{meant} it has {', '.join(short)}")
        if target in addressed:
            raise ConfigError(f"head {name!r}: {key!r} and {target!r} are the same setting; give one of them")
        if target == "scale" and value != "passthrough" and not hasattr(value, "transform"):
            raise ConfigError(f"head {name!r}: scale is {value!r}; give passthrough, or a scikit-learn transformer")
        addressed[target] = value
    return addressed


def _spec(name: str) -> HeadSpec:
    if name not in TABLE:
        raise unknown("head", name, TABLE)
    return TABLE[name]


def _task(task: str) -> Task:
    for known in TASKS:
        if task == known:
            return known
    raise unknown("task", task, TASKS)


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
