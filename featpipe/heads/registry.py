"""The registry of heads: their tasks, estimators, defaults and search grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

from featpipe.config import TASKS, Task, unknown_name_error
from featpipe.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class HeadSpec:
    """An entry of the registry.

    Attributes
    ----------
    summary : str
        One sentence that helps to choose a head.
    estimators : mapping of task to str
        "module:Class" for each supported task; imported when the head is built.
    fixed : mapping of task to mapping
        Settings that the task implies; users cannot change them.
    defaults : mapping from setting to value
        Settings that differ from the estimator's own defaults.
    grid : mapping from setting to values
        Candidates of a hyperparameter search.
    standardize : bool
        Whether a StandardScaler precedes the estimator.
    """

    summary: str
    estimators: Mapping[Task, str]
    fixed: Mapping[Task, Mapping[str, object]] = field(default_factory=dict)
    defaults: Mapping[str, object] = field(default_factory=dict)
    grid: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    standardize: bool = True


SIMILARITY_TEMPERATURE = 0.07


def nearness(distances: NDArray[np.floating]) -> NDArray[np.floating]:
    """Weights of neighbours from their cosine distances: exp(similarity / 0.07), up to a constant factor.

    These are the weights of Wu, Xiong, Yu and Lin, "Unsupervised feature learning via non-parametric instance
    discrimination" (CVPR 2018). Unlike inverse distances they do not let a copy of an image outweigh all others.

    Parameters
    ----------
    distances : ndarray of shape (m, n_neighbors)

    Returns
    -------
    ndarray of the same shape
    """
    import numpy as np  # here: the registry needs this function, and listing heads needs no numpy

    return np.asarray(np.exp(-distances / SIMILARITY_TEMPERATURE))


nearness.__module__ = "featpipe.heads"


_FIXED_MULTILABEL: Mapping[Task, Mapping[str, object]] = {
    "classification": {"multilabel": False},
    "multilabel": {"multilabel": True},
}
_MLP_ESTIMATORS: Mapping[Task, str] = {
    "classification": "featpipe.heads.neural.estimators:MLPClassifier",
    "regression": "featpipe.heads.neural.estimators:MLPRegressor",
    "multilabel": "featpipe.heads.neural.estimators:MLPClassifier",
}
HEAD_REGISTRY: dict[str, HeadSpec] = {
    "logistic": HeadSpec(
        summary="softmax regression, solved to the optimum; its strength C is tuned unless it is set",
        estimators={
            "classification": "featpipe.heads.logistic.estimator:SoftmaxRegression",
            "multilabel": "featpipe.heads.logistic.estimator:SoftmaxRegression",
        },
        fixed=_FIXED_MULTILABEL,
        grid={"C": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)},
    ),
    "mlp": HeadSpec(
        summary="multi-layer perceptron, trained by minibatches",
        estimators=_MLP_ESTIMATORS,
        fixed=_FIXED_MULTILABEL,
        grid={"hidden": (128, 512), "dropout": (0.0, 0.3), "learning_rate": (3e-4, 1e-3)},
    ),
    "linear": HeadSpec(
        summary="one linear layer, trained by minibatches",
        estimators={
            "classification": "featpipe.heads.neural.estimators:LinearClassifier",
            "regression": "featpipe.heads.neural.estimators:LinearRegressor",
            "multilabel": "featpipe.heads.neural.estimators:LinearClassifier",
        },
        fixed=_FIXED_MULTILABEL,
        grid={"learning_rate": (3e-4, 1e-3, 3e-3), "weight_decay": (1e-4, 1e-2, 1.0)},
    ),
    "svm": HeadSpec(
        summary="linear support vector machine, one class against the rest",
        estimators={"classification": "sklearn.svm:LinearSVC"},
        defaults={"C": 0.01, "dual": "auto"},
        grid={"C": (1e-4, 1e-3, 1e-2, 1e-1, 1.0)},
    ),
    "ridge": HeadSpec(
        summary="least squares with an L2 penalty, in closed form",
        estimators={
            "classification": "featpipe.heads.closed_form.solve:BayesianRidgeClassifier",
            "regression": "sklearn.linear_model:Ridge",
        },
        defaults={"alpha": 1.0},  # for classes also "auto": chosen by evidence
        grid={"alpha": (1.0, 10.0, 100.0, 1e3, 1e4)},
    ),
    "lda": HeadSpec(
        summary="linear discriminant analysis with a shrunk covariance, in closed form",
        estimators={"classification": "sklearn.discriminant_analysis:LinearDiscriminantAnalysis"},
        defaults={"solver": "lsqr", "shrinkage": "auto"},
        grid={"shrinkage": ("auto", 0.03, 0.1, 0.3, 0.9)},
    ),
    "knn": HeadSpec(
        summary="nearest neighbours by cosine, nearer ones weigh more; keeps all training embeddings",
        estimators={
            "classification": "sklearn.neighbors:KNeighborsClassifier",
            "regression": "sklearn.neighbors:KNeighborsRegressor",
        },
        defaults={"metric": "cosine", "weights": nearness, "algorithm": "brute"},
        grid={"n_neighbors": (1, 3, 5, 10, 20)},
        standardize=False,
    ),
    "centroid": HeadSpec(
        summary="nearest class mean, relative to the spread within classes",
        estimators={"classification": "sklearn.neighbors:NearestCentroid"},
        defaults={"priors": "empirical"},
        grid={"shrink_threshold": (None, 0.1, 0.3, 1.0)},
    ),
    "keras": HeadSpec(
        summary="the recipe of Keras's guides: Dense 1024 with ReLU and a softmax, Adam, 10 epochs",
        estimators=_MLP_ESTIMATORS,
        fixed=_FIXED_MULTILABEL,
        defaults={
            "hidden": (1024,),
            "initial_weights": "glorot",
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "schedule": "constant",
            "batch_size": 32,
            "epochs": 10,
        },
        grid={"learning_rate": (3e-4, 1e-3, 3e-3)},
        standardize=False,
    ),
}
"""The built-in heads; `get_spec` also accepts the import path of any scikit-learn estimator."""


def list_heads(task: str | None = None) -> list[str]:
    """The names of the heads that support a task, or of all heads, in the order of the registry.

    Examples
    --------
    >>> list_heads("multilabel")
    ['logistic', 'mlp', 'linear', 'keras']
    """
    if task is None:
        return list(HEAD_REGISTRY)
    head_task = _parse_task(task)
    return [name for name, spec in HEAD_REGISTRY.items() if head_task in spec.estimators]


def describe(name: str) -> str:
    """The summary of a head, one sentence.

    Examples
    --------
    >>> describe("linear")
    'one linear layer, trained by minibatches'
    """
    return get_spec(name).summary


def get_settings(name: str, task: str | None = None) -> dict[str, object]:
    """The settings of a head with their defaults, under the names that `build` takes.

    Parameters
    ----------
    name : str
    task : {"classification", "regression", "multilabel"}, optional
        Defaults to the first task that the head supports.

    Examples
    --------
    >>> get_settings("knn")["n_neighbors"]
    5
    """
    spec = get_spec(name)
    head_task = next(iter(spec.estimators)) if task is None else task
    head = build(name, head_task).named_steps["head"]
    excluded = {"random_state", "verbose", "n_jobs", "copy_X", *spec.fixed.get(_parse_task(head_task), {})}
    return {key: value for key, value in head.get_params(deep=False).items() if key not in excluded}


def get_spec(name: str) -> HeadSpec:
    """The registry entry of a head, or a new one for the import path of an estimator.

    Parameters
    ----------
    name : str
        A registered name such as ``logistic``, or ``package.module.Class`` or ``package.module:Class``.

    Raises
    ------
    ConfigError
        If the name is unknown, cannot be imported, or is not a scikit-learn classifier or regressor.

    Examples
    --------
    >>> list(get_spec("sklearn.ensemble.RandomForestClassifier").estimators)
    ['classification']
    """
    if name in HEAD_REGISTRY:
        return HEAD_REGISTRY[name]
    path = name if ":" in name else ":".join(name.rpartition(".")[::2])
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise unknown_name_error("head", name, HEAD_REGISTRY)
    try:
        estimator_class = _import_object(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"head {name!r} cannot be imported ({' '.join(str(error).split())})") from None
    return HeadSpec(summary=f"{attribute} of {module}", estimators={_infer_task(estimator_class, name): path})


def build(
    name: str,
    task: str = "classification",
    *,
    params: Mapping[str, object] | None = None,
    random_state: int | None = 0,
) -> Any:
    """Build an unfitted head: a scikit-learn Pipeline with the steps "scale" and "head".

    Parameters
    ----------
    name : str
        A registered name, or the import path of an estimator.
    task : {"classification", "regression", "multilabel"}
    params : mapping, optional
        Settings of the head by name (``C``), or of the pipeline in scikit-learn's notation (``scale__with_mean``);
        ``scale`` itself may be "standard" or "passthrough".
    random_state : int or None
        Seed of heads that use random numbers.

    Raises
    ------
    ConfigError
        If the head or a setting is unknown, the head does not support the task, or a setting is out of range.

    Examples
    --------
    >>> build("logistic", params={"C": 10}).named_steps["head"].C
    10
    """
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    spec, head_task = get_spec(name), _parse_task(task)
    if head_task not in spec.estimators:
        raise ConfigError(
            f"head {name!r} supports {' and '.join(spec.estimators)}, not {task}; use {' or '.join(list_heads(task))}"
        )
    fixed = dict(spec.fixed.get(head_task, {}))
    head = _import_object(spec.estimators[head_task])()
    settable = head.get_params(deep=False).keys()
    settings = {**spec.defaults, **fixed, "random_state": random_state}
    head.set_params(**{key: value for key, value in settings.items() if key in settable})
    pipeline = Pipeline([("scale", StandardScaler()), ("head", head)])
    param_names = sorted(key for key in pipeline.get_params() if "__" in key or key == "scale")
    param_names = [key for key in param_names if key.removeprefix("head__") not in fixed]
    pipeline_params = _to_pipeline_params(params or {}, param_names, name)
    if not spec.standardize and pipeline_params.get("scale") != "standard":
        pipeline_params.setdefault("scale", "passthrough")
    if pipeline_params.get("scale") == "standard":
        del pipeline_params["scale"]
    pipeline.set_params(**pipeline_params)
    if hasattr(head, "check_params"):
        try:
            head.check_params()
        except ValueError as error:
            raise ConfigError(f"head {name!r}: {error}") from None
    return pipeline


def _to_pipeline_params(params: Mapping[str, object], param_names: list[str], name: str) -> dict[str, object]:
    short_names = {key.removeprefix("head__"): key for key in param_names}
    pipeline_params = {}
    for key, value in params.items():
        param_name = short_names.get(key, key)
        if param_name not in param_names:
            matches = get_close_matches(key, short_names, n=1, cutoff=0.5)
            suggestion = f", did you mean {matches[0]!r}?" if matches else ";"
            raise ConfigError(
                f"head {name!r} has no setting {key!r}{suggestion} `featpipe heads {name}` lists what it has"
            )
        if param_name in pipeline_params:
            raise ConfigError(f"head {name!r}: {key!r} and {param_name!r} are the same setting; give one of them")
        if param_name == "scale" and value not in ("standard", "passthrough") and not hasattr(value, "transform"):
            raise ConfigError(f"head {name!r}: scale is {value!r}; give standard, passthrough, or a transformer")
        pipeline_params[param_name] = value
    return pipeline_params


def _parse_task(task: str) -> Task:
    if task not in TASKS:
        raise unknown_name_error("task", task, TASKS)
    return task


def _infer_task(estimator_class: Any, name: str) -> Task:
    from sklearn.base import is_classifier, is_regressor

    if isinstance(estimator_class, type) and hasattr(estimator_class, "fit") and hasattr(estimator_class, "get_params"):
        try:
            head = estimator_class()
        except TypeError as error:
            raise ConfigError(
                f"head {name!r} cannot be built without settings ({error}); give an estimator with default settings"
            ) from None
        if is_classifier(head):
            return "classification"
        if is_regressor(head):
            return "regression"
    raise ConfigError(f"head {name!r} is not a scikit-learn classifier or regressor; give the import path of one")


def _import_object(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)
