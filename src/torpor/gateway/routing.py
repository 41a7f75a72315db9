"""Which upstream a request goes to: by its path's prefix, by what an upstream's paths allow, then by its model.

Pure, from the configuration. Admission asks which upstreams may take a request (`destination`), the pump which of them
it goes to (`choose`), once the model is known.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torpor.config import Family, Upstream, key_variable
from torpor.gateway.dialects import OWN, RAW, find_route
from torpor.gateway.dialects.base import Dialect, Route, is_plain_segment
from torpor.gateway.failure import NoAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A request that may go upstream.

    Attributes:
        candidates: who takes such a request; the model decides between them. None if it is answered here.
        decided: the path named the upstream, so the model does not matter.
    """

    dialect: Dialect
    route: Route
    candidates: tuple[Upstream, ...]
    decided: bool = False


class Routing:
    """The configured upstreams."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self._without_prefix = [upstream for upstream in upstreams if upstream.models or upstream.is_default]
        self._by_prefix = sorted(
            (upstream for upstream in upstreams if upstream.path_prefix),
            key=lambda upstream: len(upstream.path_prefix),
            reverse=True,
        )

    def destination(self, method: str, target: str, first: Sequence[Dialect]) -> Destination | None:
        """Where a request may go; None if no agent may make it. `first` are the dialects that it is likely in."""
        path, _, query = target.partition("?")
        own = OWN.route(method, path, query)
        if own is not None:
            return Destination(dialect=OWN, route=own, candidates=())
        prefixed = next((known for known in self._by_prefix if path.startswith(known.path_prefix + "/")), None)
        if prefixed is not None:
            path = path[len(prefixed.path_prefix) :]
        found = find_route(method, path, query, first)
        if found is not None:
            dialect, route = found
            family = (upstream for upstream in self._without_prefix if upstream.family == dialect.family)
            candidates = (prefixed,) if prefixed else tuple(family)
            return Destination(dialect=dialect, route=route, candidates=candidates, decided=prefixed is not None)
        allowing = tuple(
            upstream
            for upstream in ((prefixed,) if prefixed else self._without_prefix)
            if _allows(upstream.paths + upstream.llm_paths, method, path)
        )
        if not allowing:
            return None
        is_llm = any(_allows(upstream.llm_paths, method, path) for upstream in allowing)
        route = Route(path=path, is_llm=is_llm)
        return Destination(dialect=RAW, route=route, candidates=allowing, decided=prefixed is not None)


def choose(destination: Destination, model: str | None) -> Upstream:
    """The upstream that a request goes to.

    Raises:
        NoAnswer: none is configured for it, or more than one is.
    """
    candidates, family = destination.candidates, destination.dialect.family
    if not candidates:
        raise _none_configured(family)
    if destination.decided:
        return candidates[0]
    serving = [upstream for upstream in candidates if model is not None and model in upstream.models]
    serving = serving or [upstream for upstream in candidates if model is not None and _serves(upstream, model)]
    serving = serving or [upstream for upstream in candidates if not upstream.models]
    if not serving and model is None and len(candidates) == 1:
        return candidates[0]
    if len(serving) == 1:
        return serving[0]
    what = "no model" if model is None else f"the model {model[:200]!r}"
    if not serving:
        reason = f"the request names {what}, which no upstream of this node serves"
        raise NoAnswer("model_not_served", reason, status=404, retry=False)
    names = " and ".join(upstream.name for upstream in serving)
    reason = f"the request names {what}, which more than one upstream of this node serves: {names}"
    raise NoAnswer("model_ambiguous", reason, status=404, retry=False)


def _none_configured(family: Family | None) -> NoAnswer:
    if family is None:
        reason = "no upstream of this node has this path among its paths any more"
    else:
        reason = f"no upstream of the family {family} is configured on this node; set {key_variable(family)} for it"
    return NoAnswer("upstream_not_configured", reason, status=401, retry=False)


def _serves(upstream: Upstream, model: str) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in upstream.models)


def _allows(allowed: Sequence[str], method: str, path: str) -> bool:
    """Whether a list of "METHOD /path" has a request; `*` stands for any method, or for anything in a path."""
    if not all(map(is_plain_segment, path[1:].split("/"))):
        return False
    for entry in allowed:
        name, _, pattern = entry.partition(" ")
        # Not a regular expression of ours: a hostile path must not make many `*` slow.
        if name in {"*", method} and fnmatchcase(path, pattern):
            return True
    return False
