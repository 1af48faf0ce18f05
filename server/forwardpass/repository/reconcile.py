"""The final signature of a model, after checking that its network, contract and options agree. Reads label files.

The network's file takes precedence. A contract must name the same tensors; options may narrow an axis of any size to
one size, show clients another shape of as many elements, name labels, and leave out outputs, which are then computed
only if requested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from forwardpass.errors import ConfigError, ContractError
from forwardpass.model.contract import Contract
from forwardpass.model.options import ModelConfig, TensorOptions
from forwardpass.model.signature import ModelSignature, TensorSpec


def reconcile(
    found: ModelSignature, config: ModelConfig, contract: Contract | None, model_folder: Path
) -> ModelSignature:
    """`found`, the signature in the network's file, completed from the contract and the options.

    Raises ConfigError or ContractError naming the tensor, what was expected and what was found.
    """
    asked_for = {options.name for options in config.outputs}
    for name, kind in found.unsendable:
        if not asked_for or name in asked_for:
            of_zipmap = "; scikit-learn's converters make a tensor of it with options={'zipmap': False}" * (
                "map(" in kind
            )
            raise ConfigError(
                f"output '{name}' is of type {kind}, which the protocol cannot carry: leave it out by naming the other "
                f"outputs in {config.origin.file}{of_zipmap}"
            )
    labels: dict[str, tuple[str, ...]] = {}
    hidden: frozenset[str] = frozenset()
    batchable = found.batchable
    if contract is not None:
        _agree(found, contract)
        labels = {t.name: tuple(t.labels) for t in contract.outputs if t.labels}
        found = dataclasses.replace(found, inputs=_described(found.inputs, contract))
        hidden = frozenset(t.name for t in contract.hidden)
        batchable = batchable and contract.batchable
    if config.origin.given is not None and config.max_batch_size and not batchable:
        fixed = next((t for t in (*found.inputs, *found.outputs) if not t.shape or t.shape[0] >= 0), None)
        why = f"'{fixed.name}' has shape {list(fixed.shape)}" if fixed is not None else "its contract declares that"
        raise ConfigError(
            f"{config.where('max_batch_size')}: expected 0, got {config.max_batch_size}: axis 0 of the network is "
            f"not a batch of any size: {why}"
        )
    in_rows = batchable and config.max_batch_size != 0
    sent = [options for options in config.inputs if options.name not in found.defaulted]
    for options in sent:
        if options.optional:
            where = config.where(f"input '{options.name}'")
            raise ConfigError(
                f"{where}: expected an input that every request sends, got optional: "
                "the network has no default for it (an initializer of that name)"
            )
    inputs = _narrowed(found.inputs, sent, "input", config, in_rows)
    outputs = _narrowed(found.outputs, config.outputs, "output", config, in_rows)
    if sent and len(sent) < len(found.inputs):
        missing = next(t.name for t in found.inputs if t.name not in {o.name for o in sent})
        raise ConfigError(f"{config.where('inputs')}: the network's input '{missing}' is not among them")
    if config.outputs:
        hidden |= {t.name for t in found.outputs} - {o.name for o in config.outputs}
    if config.labels is not None:
        named = _labels(model_folder / config.labels, "labels")
        labels.update({t.name: named for t in outputs if t.shape and t.shape[-1] in (-1, len(named))})
    for options in config.outputs:
        if options.labels is not None:
            labels[options.name] = _labels(model_folder / options.labels, config.where(f"output '{options.name}'"))
    outputs = tuple(dataclasses.replace(t, labels=labels.get(t.name, ())) for t in outputs)
    return ModelSignature(inputs, outputs, in_rows, hidden, found.defaulted)


def _described(inputs: Sequence[TensorSpec], contract: Contract) -> tuple[TensorSpec, ...]:
    """The inputs with the columns and categories that the contract names."""
    by_name = {tensor.name: tensor for tensor in contract.inputs}
    return tuple(
        dataclasses.replace(
            tensor,
            labels=tuple(by_name[tensor.name].labels or ()),
            categories=tuple(by_name[tensor.name].categories or ()),
        )
        for tensor in inputs
    )


def _narrowed(
    tensors: Sequence[TensorSpec], options: Sequence[TensorOptions], what: str, config: ModelConfig, in_rows: bool
) -> tuple[TensorSpec, ...]:
    """The network's tensors with the shapes from the options."""
    by_name = {o.name: o for o in options}
    unknown = sorted(by_name.keys() - {t.name for t in tensors})
    if unknown:
        have = ", ".join(t.name for t in tensors)
        where = config.where(f"{what} '{unknown[0]}'")
        raise ConfigError(f"{where}: the network has no such {what}; it has {have}")
    found = []
    for tensor in tensors:
        shape = tensor.shape[1:] if in_rows else tensor.shape
        told = by_name.get(tensor.name)
        if told is None:
            found.append(tensor)
            continue
        where = config.where(f"{what} '{told.name}'")
        if told.datatype not in (None, tensor.datatype.name):
            raise ConfigError(f"{where}: expected datatype {tensor.datatype.name}, as the network, got {told.datatype}")
        if told.dims is None:
            found.append(tensor)
            continue
        # Triton's configurations show a scalar as one element, and its clients send it so.
        reshape = [] if told.reshape is None and told.dims == [1] and not shape else told.reshape
        option, own = ("dims", told.dims) if reshape is None else ("reshape", reshape)
        if len(own) != len(shape) or any(h not in (-1, d) for h, d in zip(shape, own, strict=True)):
            rows = " for one row" if in_rows else ""
            raise ConfigError(f"{where}: expected {option} {list(shape)}{rows}, as the network's, got {own}")
        batch = tensor.shape[:1] if in_rows else ()
        network_shape = None if reshape is None or own == told.dims else (*batch, *own)
        found.append(dataclasses.replace(tensor, shape=(*batch, *told.dims), network_shape=network_shape))
    return tuple(found)


def _agree(found: ModelSignature, contract: Contract) -> None:
    """Check that the contract names the tensors in the network's file, with matching types and shapes."""
    for what, have, want in (
        ("inputs", found.inputs, contract.inputs),
        ("outputs", found.outputs, [*contract.outputs, *contract.hidden]),
    ):
        names, wanted = sorted(t.name for t in have), sorted(t.name for t in want)
        if names != wanted:
            raise ContractError(f"the contract's {what} are {', '.join(wanted)}, the network's are {', '.join(names)}")
        by_name = {t.name: t for t in have}
        for spec in want:
            tensor = by_name[spec.name]
            # The contract may give a size to an axis of any size; other sizes must equal the network's.
            fits = len(spec.shape) == len(tensor.shape) and all(
                theirs in (-1, ours) for ours, theirs in zip(spec.shape, tensor.shape, strict=True)
            )
            if spec.datatype != tensor.datatype.name or not fits:
                raise ContractError(
                    f"the contract's '{spec.name}' is {spec.datatype} {spec.shape}, the network's is "
                    f"{tensor.datatype.name} {list(tensor.shape)}"
                )


def _labels(path: Path, where: str) -> tuple[str, ...]:
    try:
        return tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {path} cannot be read: {error}") from None
