"""optuna's study of a search: opened or made, checked to be of this search; and what a trial is given."""

import re
import socket
from dataclasses import asdict
from itertools import product
from typing import Any

from mmtrain.config import UserError
from mmtrain.config.search import Range, Search, Space
from mmtrain.config.sweep import written
from mmtrain.track import redact

IDENTITY = "mmtrain"  # user attribute of the study: what it is about
ANSWER_SECONDS = 10.0
PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}


def open_study(search: Search) -> Any:
    """The study of a search. Raises UserError where it is of another one, and where its storage does not answer."""
    try:
        import optuna  # noqa: PLC0415 - a second
    except ModuleNotFoundError as error:
        raise UserError("`mmtrain sweep` needs optuna; install it with pip install 'mmtrain[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep = search.settings.sweep
    study = optuna.create_study(
        study_name=search.folder.name,
        storage=_storage(search),
        sampler=sampler_for(sweep.sampler, 0),
        pruner=_pruner(search),
        load_if_exists=True,
    )
    known, identity = study.user_attrs.get(IDENTITY), _identity(search)
    if known is None:
        if study.get_trials(deepcopy=False) or list(search.folder.glob("trial-*")):
            raise UserError(f"{search.folder} holds trials of a search whose study is gone; choose another name=")
        if sweep.sampler == "grid":
            for point in product(*(v.points() if isinstance(v, Range) else v for v in search.space.values())):
                study.enqueue_trial(dict(zip(search.space, map(_stored, search.space.values(), point), strict=True)))
        study.set_user_attr(IDENTITY, identity)
    elif known != identity:
        key = next(key for key in identity if known.get(key) != identity[key])
        raise UserError(
            f"{search.folder} holds another search ({key} was {known.get(key)}, and is {identity[key]} now); say the "
            "same, or choose another name="
        )
    return study


def _identity(search: Search) -> dict[str, Any]:
    """What may not change between two starts, as JSON gives it back."""
    sweep = search.settings.sweep
    space = {key: asdict(v) if isinstance(v, Range) else list(v) for key, v in search.space.items()}
    pruner = [sweep.pruner, sweep.first_rung, sweep.reduction]
    return {"settings": redact(sorted(search.own)), "space": space, "metric": sweep.metric, "pruner": pruner} | {
        "sampler": sweep.sampler,
        "seed": search.settings.seed,
    }


def _storage(search: Search) -> Any:
    import optuna  # noqa: PLC0415
    import sqlalchemy  # noqa: PLC0415

    url = search.settings.sweep.storage or f"sqlite:///{(search.folder / 'study.db').resolve()}"
    shown = redact(url)
    try:
        parsed = sqlalchemy.make_url(url)
        backend = parsed.get_backend_name()
        if parsed.host:
            socket.create_connection((parsed.host, parsed.port or PORTS.get(backend, 0)), ANSWER_SECONDS).close()
        limit = "timeout" if backend == "sqlite" else "connect_timeout"  # of a lock, of a connection
        arguments = {limit: 60 if backend == "sqlite" else int(ANSWER_SECONDS)}
        return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": arguments, "pool_pre_ping": True})
    except ImportError as error:
        driver = re.search(r"'([\w.]+)'|pip install (\S+)", str(error))
        raise UserError(
            f"sweep.storage={shown} needs a driver that is not installed ({driver[1] or driver[2] if driver else error}"
            "); install it, or use another"
        ) from error
    except (OSError, sqlalchemy.exc.SQLAlchemyError, RuntimeError) as error:
        reason = redact(str(getattr(error, "orig", None) or error).strip().splitlines()[0])
        raise UserError(
            f"sweep.storage={shown} does not answer ({reason}); start the server, mend the URL, or leave it out"
        ) from error


def sampler_for(name: str, seed: int) -> Any:
    """The sampler of one trial. Points of a grid are enqueued, so that none is drawn twice: theirs draws nothing."""
    import optuna  # noqa: PLC0415

    if name == "tpe":  # constant_liar: trials that other workers have not finished count, too
        return optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed % 2**32)


def _pruner(search: Search) -> Any:
    """Resources are shares of a trial's steps, in percent: trials of one budget in FLOPs differ in their steps."""
    import optuna  # noqa: PLC0415

    sweep = search.settings.sweep
    first = max(1, round(100 * sweep.first_rung))
    if sweep.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=sweep.reduction)
    if sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(first, max_resource=100, reduction_factor=sweep.reduction)
    return optuna.pruners.NopPruner()


def suggest(trial: Any, space: Space) -> dict[str, str]:
    """A value for every setting, as a command line says it; those that the trial has already stay."""
    chosen = {}
    for key, values in space.items():
        if not isinstance(values, Range):
            chosen[key] = trial.suggest_categorical(key, values)
        elif values.is_whole:
            chosen[key] = written(
                trial.suggest_int(key, int(values.low), int(values.high), step=int(values.step or 1), log=values.log)
            )
        else:
            chosen[key] = written(trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log))
    return chosen


def _stored(values: Range | tuple[str, ...], point: str) -> Any:
    """A value of a grid as optuna keeps it."""
    if not isinstance(values, Range):
        return point
    return int(point) if values.is_whole else float(point)
