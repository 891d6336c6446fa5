"""Options of pruning, and which of them exclude each other.

Invariant: all problems of the options are reported at once, before any model is read. Try it:
``mlx-slim prune MODEL -o DIR --axis depth --no-heads``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Interval

from mlx_slim.config.options import option
from mlx_slim.config.values import MOST, Strict
from mlx_slim.errors import SlimError, did_you_mean
from mlx_slim.models.kinds import EXPERTS, HEADS, HIDDEN, MLP
from mlx_slim.pruning.methods import GRADIENT, OF_DEPTH, OF_EXPERTS, OF_WIDTH, SIZE_FLAGS

NAMED = "named"
_DEFAULT = {"depth": "block-influence", "width": "taylor"}
_DEFAULT_OF_CHANNELS, _DEFAULT_OF_EXPERTS = "activation", "reap"
_METHODS = {"depth": OF_DEPTH, "width": OF_WIDTH}
# Rows of calibration text x tokens: as in arXiv 2305.11627 for gradients; forward passes and
# similarities are cheaper and noisier.
_GRADIENT_ROWS, FORWARD_ROWS = (10, 64), (32, 256)


_WIDTH = "taylor, taylor2, vector, activation, l2, random; of experts reap"
_DEPTH, _BEST = "block-influence, angular, perplexity, random", "block-influence"
_Width = Annotated[int, Interval(ge=1, le=MOST), Strict()]
_Size = Annotated[int, Interval(ge=1, le=2**60), Strict()]


@dataclass(frozen=True)
class PruneOptions:
    """What to remove, and the calibration text; the only place of these defaults.

    Attributes:
        axis: ``depth`` (layers) or ``width`` (heads, neurons and channels); None follows from the
            method.
        method: Of ``methods.OF_DEPTH`` or ``methods.OF_WIDTH``; None is block influence, taylor,
            or activation where the residual stream is pruned.
        layers: Layers by number, such as ``21-29,31``, instead of a method and a size.
        ratio: Fraction of the layers, or (at most) of the groups of each layer that is not
            protected.
        target_params: Upper limit of the remaining parameters.
        target_bytes: Upper limit of the remaining bytes of weights.
        heads: Prune attention heads; None does where the config can express the widths.
        mlp: Prune MLP neurons; None does.
        hidden: Prune channels of the residual stream, the same in all layers.
        hidden_size: Channels of the residual stream that remain, instead of a ratio or target.
        intermediate_size: Neurons of each layer that remain, the same.
        kv_heads: Key-value heads of each layer that remain, the same.
        experts: Experts of each layer of a mixture that remain, the same.
        uniform: The same widths in every layer.
        ranking: ``layer`` or ``global``: groups are ranked within their layer, or over all layers.
        protect_first: First layers that are unchanged; None scales 4 of 32.
        protect_last: Last layers that are unchanged; None scales 2 of 32.
        calibration: Text or data set; None is the Alpaca mirror.
        samples: Calibration rows; None chooses by method.
        length: Tokens of a row; None chooses by method.
        held_out: Tokens of validation text, about.
        seed: Of the random controls.
        revision: Commit or tag of a hub model.
        compensate: Refit the layers that read pruned groups, by least squares.
    """

    axis: Literal["depth", "width"] | None = field(
        default=None,
        metadata=option("depth: layers; width: heads, neurons, channels. Default: by the method."),
    )
    method: str | None = field(
        default=None,
        metadata=option(
            f"Width: {_WIDTH} [taylor; of channels activation]. Depth: {_DEPTH} [{_BEST}]."
        ),
    )
    layers: str | None = field(
        default=None, metadata=option("Remove these layers, counted from 0.", metavar="A-B,C")
    )
    ratio: Annotated[float, Interval(gt=0, lt=1), Strict()] | None = None
    target_params: _Size | None = None
    target_bytes: _Size | None = None
    heads: bool | None = field(default=None, metadata=option("Prune attention heads (KV groups)."))
    mlp: bool | None = field(default=None, metadata=option("Prune MLP neurons."))
    hidden: bool = field(
        default=False,
        metadata=option("Prune channels of the residual stream too, the same in every layer."),
    )
    hidden_size: _Width | None = field(
        default=None, metadata=option("Channels of the residual stream to leave.", metavar="N")
    )
    intermediate_size: _Width | None = field(
        default=None, metadata=option("Neurons of each layer to leave.", metavar="N")
    )
    kv_heads: _Width | None = field(
        default=None, metadata=option("Key-value heads of each layer to leave.", metavar="N")
    )
    experts: _Width | None = field(
        default=None, metadata=option("Experts of each layer of a mixture to leave.", metavar="N")
    )
    uniform: bool = field(
        default=True,
        metadata=option(
            "The same widths in every layer: stock mlx-lm reads it; else only mlx-slim."
        ),
    )
    ranking: Literal["layer", "global"] = field(
        default="layer",
        metadata=option("Rank groups within a layer, or over all (with --no-uniform)."),
    )
    protect_first: Annotated[int, Interval(ge=0, le=MOST), Strict()] | None = field(
        default=None, metadata=option("Never remove the first N layers [4 of 32].")
    )
    protect_last: Annotated[int, Interval(ge=0, le=MOST), Strict()] | None = field(
        default=None, metadata=option("Never remove the last N layers [2 of 32].")
    )
    calibration: str | None = field(
        default=None, metadata=option("Text file or data set; default Alpaca.", metavar="TEXT")
    )
    samples: Annotated[int, Interval(ge=1, le=MOST), Strict()] | None = field(
        default=None, metadata=option("Calibration rows [10, forward only 32].")
    )
    length: Annotated[int, Interval(ge=8, le=MOST), Strict()] | None = field(
        default=None, metadata=option("Tokens of a row [64, forward only 256].")
    )
    held_out: Annotated[int, Interval(ge=16, le=MOST), Strict()] = field(
        default=2048, metadata=option("Validation tokens to measure the effect on.")
    )
    seed: Annotated[int, Interval(ge=0, lt=2**32), Strict()] = field(
        default=0, metadata=option("Seed of --method random.")
    )
    revision: str | None = field(default=None, metadata=option("Commit or tag of a hub model."))
    compensate: bool = field(
        default=False,
        metadata=option("Width: refit what reads the pruned groups, by least squares."),
    )

    @property
    def named_sizes(self) -> dict[str, int]:
        """Kind -> groups of a layer that remain, where the options name their number."""
        sizes = {
            HEADS: self.kv_heads,
            MLP: self.intermediate_size,
            HIDDEN: self.hidden_size,
            EXPERTS: self.experts,
        }
        return {kind: size for kind, size in sizes.items() if size is not None}

    @property
    def prunes_channels(self) -> bool:
        """Whether the residual stream is pruned."""
        return self.hidden or self.hidden_size is not None


def one_error(problems: list[tuple[str, str]]) -> SlimError:
    """Return all problems, (message, hint) each, as one error."""
    if len(problems) == 1:
        return SlimError(*problems[0])
    details = [f"{message} ({hint})" if hint else message for message, hint in problems]
    return SlimError(f"{len(problems)} problems", details=details)


def method_of(options: PruneOptions) -> tuple[str, str]:
    """Return axis and method, each from the other where one is absent."""
    axis, method = options.axis, options.method
    if options.layers is not None:
        return axis or "depth", method or NAMED
    if method is None:
        axis = axis or "width"
        if axis == "width" and options.prunes_channels:
            return axis, _DEFAULT_OF_CHANNELS
        if axis == "width" and options.experts is not None:
            return axis, _DEFAULT_OF_EXPERTS
        return axis, _DEFAULT[axis]
    for candidate in [axis] if axis else ["width", "depth"]:
        if method in _METHODS[candidate]:
            return candidate, method
    choices = _METHODS[axis] if axis else sorted({*_METHODS["width"], *_METHODS["depth"]})
    other = next((a for a in _METHODS if method in _METHODS[a]), None)
    hint = f"it is a method of --axis {other}" if other else did_you_mean(method, choices)
    raise SlimError(f"no method {method!r}" + (f" of axis {axis}" if axis else ""), hint)


def conflicts(options: PruneOptions, axis: str, method: str) -> list[tuple[str, str]]:
    """Return (message, hint) of all options that exclude each other."""
    problems: list[tuple[str, str]] = []
    sizes = [
        name
        for name in ("layers", "ratio", "target_params", "target_bytes")
        if getattr(options, name) is not None
    ]
    flags = [f"--{name.replace('_', '-')}" for name in sizes]
    named = [SIZE_FLAGS[kind] for kind in options.named_sizes]
    flags += [", ".join(named)] if named else []
    if len(flags) != 1:
        problem = "no size is set" if not flags else f"{' and '.join(flags)} exclude each other"
        choices = ", ".join(SIZE_FLAGS.values())
        problems.append(
            (
                problem,
                "set one of --ratio, --target-params, --target-bytes, --layers; or some of "
                f"{choices}",
            )
        )
    if options.layers is not None and (axis != "depth" or options.method is not None):
        problems.append(("--layers lists the layers: it excludes --method and --axis width", ""))
    if options.ratio is not None and not 0 < options.ratio < 1:
        problems.append((f"--ratio is {options.ratio:g}, expected more than 0 and less than 1", ""))
    for name in ("target_params", "target_bytes", "samples", "held_out"):
        value = getattr(options, name)
        if value is not None and value < 1:
            problems.append((f"--{name.replace('_', '-')} is {value}, expected at least 1", ""))
    if options.length is not None and options.length < 8:
        problems.append((f"--length is {options.length}, expected at least 8", ""))
    protected = [
        f"--{name.replace('_', '-')}"
        for name in ("protect_first", "protect_last")
        if getattr(options, name) is not None
    ]
    if axis == "depth":
        wide = [f"--{'' if value else 'no-'}{kind}" for kind, value in _kinds(options).items()]
        wide += [] if options.uniform else ["--no-uniform"]
        wide += [] if options.ranking == "layer" else ["--ranking"]
        wide += named
        wide += ["--compensate"] if options.compensate else []
        if wide:
            problems.append((f"{', '.join(wide)}: only for width pruning", "set --axis width"))
    else:
        if options.compensate and options.samples == 1:
            problems.append(
                ("--compensate with --samples 1: half of the rows chooses how far", "set 2 or more")
            )
        uneven = [*protected] + ([] if options.ranking == "layer" else ["--ranking global"])
        if options.uniform and uneven:
            problems.append(
                (f"{', '.join(uneven)}: --uniform gives all layers one width", "set --no-uniform")
            )
        kinds = [f"--{'' if value else 'no-'}{kind}" for kind, value in _kinds(options).items()]
        if options.heads is False and options.mlp is False and not options.prunes_channels:
            problems.append(("--no-heads and --no-mlp leave nothing to prune", ""))
        if named and kinds:
            problems.append(
                (f"{', '.join(kinds)}: {', '.join(named)} say what is pruned", "leave it out")
            )
        same = named + (["--hidden"] if options.hidden else [])
        if same and not options.uniform:
            problems.append((f"{', '.join(same)}: one width of all layers", "set --uniform"))
        if options.prunes_channels and method in GRADIENT:
            problems.append(
                (
                    f"--method {method} does not score channels of the residual stream: it "
                    "differentiates one block at a time",
                    "set --method activation, l2 or random",
                )
            )
    if options.layers is not None and protected:
        problems.append((f"{', '.join(protected)}: --layers lists the layers to remove", ""))
    return problems


def check_experts(options: PruneOptions, axis: str, method: str, *, mixture: bool) -> None:
    """Check that a mixture loses experts, by a method that scores them, and a dense model none.

    Raises:
        SlimError: With the option to change.
    """
    if not mixture:
        if method == _DEFAULT_OF_EXPERTS or options.experts is not None:
            flag = "--experts" if options.experts is not None else f"--method {method}"
            raise SlimError(
                f"{flag}: the model is no mixture of experts that can be pruned",
                "leave it out: heads, neurons, channels or layers can be pruned",
            )
        return
    others = [SIZE_FLAGS[kind] for kind in options.named_sizes if kind != EXPERTS]
    others += [f"--{'' if value else 'no-'}{kind}" for kind, value in _kinds(options).items()]
    others += [] if options.uniform else ["--no-uniform"]
    others += ["--compensate"] if options.compensate else []
    if axis == "depth":
        others.append(f"--method {method}" if options.layers is None else "--layers")
    elif method not in OF_EXPERTS:
        others.append(f"--method {method}")
    if others:
        raise SlimError(
            f"{', '.join(others)}: of a mixture of experts only experts can be pruned, as many in "
            "every layer",
            f"set --method {' or '.join(OF_EXPERTS)}, and --ratio, --experts or a target",
        )


def _kinds(options: PruneOptions) -> dict[str, bool]:
    kinds = {HEADS: options.heads, MLP: options.mlp, HIDDEN: options.hidden or None}
    return {kind: value for kind, value in kinds.items() if value is not None}


def rows_of(options: PruneOptions, method: str) -> tuple[int, int]:
    """Return calibration rows and their tokens; (0, 0) for a method that needs none."""
    if method in ("l2", "random", NAMED):
        return 0, 0
    samples, length = _GRADIENT_ROWS if method in GRADIENT else FORWARD_ROWS
    return options.samples or samples, options.length or length
