"""An engine from model files: loads target and draft model and measures their costs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from edgespec.acceptance import Acceptance
from edgespec.app.engine import calibration
from edgespec.app.engine.corpus_store import index_for
from edgespec.app.engine.drafters import Drafters, DraftModel
from edgespec.app.engine.engine import Engine
from edgespec.app.engine.resources import ResourceController
from edgespec.app.engine.slots import Slot, SlotPool
from edgespec.core import EdgespecError, Progress
from edgespec.costs import CostCurve
from edgespec.machine.governor import Mode
from edgespec.models.exact import exact_options
from edgespec.models.gguf.assistant import AssistantModel
from edgespec.models.gguf.check import check_gguf
from edgespec.models.gguf.dspark import DsparkModel
from edgespec.models.gguf.eagle3 import Eagle3Model
from edgespec.models.gguf.heads import heads, is_head
from edgespec.models.gguf.hidden import HeadModel, mismatch
from edgespec.models.gguf.model import LlamaModel, LlamaSequence
from edgespec.models.gguf.mtp import MtpModel
from edgespec.models.gguf.native import LlamaOptions
from edgespec.models.memory import unless_too_large
from edgespec.models.onnx.model import OnnxOptions
from edgespec.models.options import Options
from edgespec.models.prompting.chat_template import ChatTemplate
from edgespec.models.runtime import (
    Model,
    ModelSequence,
    check_model,
    load_draft,
    load_model,
    options_for,
    refusal_as_draft,
    settled,
)
from edgespec.models.vocab import first_difference
from edgespec.overlap import AHEAD, pays
from edgespec.planner import best_case

HEADS: dict[str, Callable[[Path, LlamaModel, Progress | None], HeadModel]] = {
    "eagle3": Eagle3Model,
    "gemma4-assistant": AssistantModel,
    "dflash": DsparkModel,
}
"""By architecture: drafters that come with a model. Those of other architectures are MTP layers."""

WORTH_LOADING = 1.1  # best case of a draft model, in plain decoding speeds: below, it is not worth its memory
Note = Callable[[str], None]


def open_engine(
    target: Path,
    draft: Path | None = None,
    *,
    suffix: bool = True,
    max_draft: int = 31,
    mode: Mode = "auto",
    exact: bool = False,
    parallel: int = 1,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load `target`, and `draft` where it can pay. With `exact`, drafts never change greedy text.

    `mode` is the governor's. There are `parallel` slots, each with a context of `options.context` tokens.
    `progress` returns False to stop loading.

    Raises EdgespecError for what the user can fix, Cancelled when stopped.
    """
    notes: list[str] = []
    options = replace(options_for(target, options or LlamaOptions()), sequences=parallel)
    if isinstance(options, LlamaOptions):
        own = draft == target and heads(check_gguf(target)) > 0
        options = replace(options, mtp=own, rows=own or (draft is not None and is_head(draft)))
    with ExitStack() as stack:  # closes what is loaded if the rest fails
        model = load_model(target, exact_options(options) if exact else options, progress, notes.append)
        stack.callback(model.close)
        slots = [Slot(model.sequence()) for _ in range(parallel)]
        sequence, costs, acceptance = slots[0].sequence, CostCurve({1: 1.0}), Acceptance()
        if max_draft and (suffix or draft is not None):
            _warm_up(slots)
            costs = calibration.curve(sequence, notes.append)
            acceptance = calibration.acceptance(model)
            if exact:
                costs.only(calibration.exact_sizes(sequence, notes.append))
        most = min(max_draft, model.options.max_rows - 1)
        fixed = exact or model.fixed_threads  # exact: other thread counts would round differently
        resources = ResourceController(
            sequence, costs, mode, most=most, fixed_threads=fixed, note=notes.append
        )
        stack.callback(resources.close)
        drafters = Drafters(most, suffix, acceptance=acceptance)
        if max_draft and suffix:
            drafters.corpus = index_for(model.vocab, model.summary.tokenizer_digest)
        if max_draft and draft is not None:
            with unless_too_large(notes.append):
                # Without the options of `exact`: a draft's rounding does not change the output.
                if isinstance(model, LlamaModel) and (model.options.mtp or is_head(draft)):
                    drafters.draft = _head(draft, model, slots, costs, progress, notes.append)
                else:
                    drafters.draft = _draft(draft, model, slots, costs, options, progress, notes.append)
        template = _template(model, notes.append)
        notes[:] = dict.fromkeys(notes)  # a note about both models appears once
        engine = Engine(model, SlotPool(slots), drafters, resources, template, exact=exact, notes=notes)
        drafters.asked_for = draft
        stack.pop_all()
    return engine


def _warm_up(slots: list[Slot]) -> None:
    """Take the first checkpoint of recurrent layers now: with new memory it takes as long as three passes.

    The first draft would otherwise be recorded as that expensive.
    """
    for sequence in (slot.sequence for slot in slots):
        if (undo := sequence.model.undo) is not None:
            rows = min(undo + 2, sequence.model.options.max_rows)
            sequence.forward([0])
            sequence.forward([0] * rows, rows)
            sequence.rollback(1)
            sequence.rollback(0)


def _template(model: Model, note: Note) -> ChatTemplate | None:
    source, vocab = model.chat_template, model.vocab
    if source is None:
        note(f"{model.path.name} has no chat template: it continues the prompt as it is")
        return None
    bos, eos = (vocab.text(token) if token is not None else "" for token in (vocab.bos, vocab.eos))
    return ChatTemplate(source, bos=bos, eos=eos, control_tokens=vocab.control_texts())


def _draft(
    path: Path,
    target: Model,
    slots: list[Slot],
    target_costs: CostCurve,
    options: Options,
    progress: Progress | None,
    note: Note,
) -> DraftModel | None:
    """Load a draft model, unless a known or a measured curve shows that it cannot pay on this machine."""
    # A trimmed draft has few logits, and many of its rows are only evaluated: room for as many as are
    # measured.
    summary = check_model(path)
    options = options_for(path, replace(options, context=target.context_length, least_context=0))
    if isinstance(options, LlamaOptions):
        options = replace(options, adapters=())
    if isinstance(options, OnnxOptions):
        options = replace(options, providers=calibration.providers(summary))
    known = calibration.known_curve(summary, settled(path, options, progress, note))
    digests = target.summary.tokenizer_digest, summary.tokenizer_digest
    matches = digests[0] == digests[1] or calibration.vocabularies_match(*digests)
    if matches and known is not None and _is_hopeless(path, target_costs, known, note):
        return None
    draft = load_draft(path, options, progress, note)
    with ExitStack() as stack:
        stack.callback(draft.close)
        if reason := _difference(target, draft) or refusal_as_draft(draft):
            raise EdgespecError(
                f"{path.name} cannot draft for {target.path.name} ({reason}): "
                "choose another with --draft, or none with --draft none"
            )
        sequences = [draft.sequence() for _ in slots]
        bandwidth = target.summary.tensor_bytes / target_costs.pace
        costs = calibration.curve(sequences[0], note, bandwidth=bandwidth)
        if _is_hopeless(path, target_costs, costs, note):
            return None
        found = DraftModel(draft, costs, draft.threads)
        if _may_overlap(slots[0].sequence, sequences[0], target_costs, costs, note):
            found.ahead = AHEAD
        stack.pop_all()
    for slot, one in zip(slots, sequences, strict=True):
        slot.drafting = one
    return found


def _head(
    path: Path,
    target: LlamaModel,
    slots: list[Slot],
    target_costs: CostCurve,
    progress: Progress | None,
    note: Note,
) -> DraftModel | None:
    """Open a drafter that comes with the target, unless its measured curve shows that it cannot pay."""
    with ExitStack() as stack:
        kind = HEADS.get(check_gguf(path).architecture, MtpModel)
        if kind is not MtpModel and target.options.engine != "llama.cpp":
            raise mismatch(path, target, "it reads inner states, which only the engine llama.cpp gives")
        head = kind(path, target, progress)
        stack.callback(head.close)
        if reason := _difference(target, head):
            raise mismatch(path, target, reason)
        sequences = [
            head.sequence_for(slot.sequence) for slot in slots if isinstance(slot.sequence, LlamaSequence)
        ]
        sequences[0].forward([0])  # its first pass takes ten times as long, which is no figure to learn from
        sequences[0].rollback(0)
        costs = calibration.curve(sequences[0], note)
        known = best_case(target_costs, costs, block=head.block_size)
        if known < WORTH_LOADING:  # in an earlier run: a tenth of a second decides
            costs = calibration.curve(sequences[0], note, fresh=True)
        if _is_hopeless(path, target_costs, costs, note, head.block_size):
            return None
        stack.pop_all()
    for slot, one in zip(slots, sequences, strict=True):
        slot.drafting = one
    return DraftModel(head, costs, head.threads, make=head.drafter)


def _may_overlap(
    target: ModelSequence, draft: ModelSequence, target_costs: CostCurve, costs: CostCurve, note: Note
) -> bool:
    """Whether the draft model may continue while the target verifies: measured unless they share cores."""
    if target.model.on_cpu and draft.model.on_cpu:
        return False
    return pays(target_costs, costs, calibration.overlap_factors(target, draft, note))


def _difference(target: Model, draft: Model) -> str | None:
    """Return why `draft` cannot draft for `target`, None if it can. Equal vocabularies are compared once."""
    digests = [model.summary.tokenizer_digest for model in (target, draft)]
    if digests[0] == digests[1] or calibration.vocabularies_match(*digests):
        return None
    difference = first_difference(target.vocab, draft.vocab)
    if difference is None:
        calibration.keep_match(*digests)
    return difference


def _is_hopeless(path: Path, target_costs: CostCurve, costs: CostCurve, note: Note, block: int = 1) -> bool:
    best = best_case(target_costs, costs, block=block)
    if best < WORTH_LOADING:
        note(
            f"{path.name} is not loaded: even if nine of ten of its draft tokens were accepted, "
            f"this machine would decode at {best:.2f} times the plain speed"
        )
    return best < WORTH_LOADING
