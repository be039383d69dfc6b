"""The sections of a report, each from one or two analyses."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from typing import Any

import torch
from torch import Tensor

from .. import exits, plots
from .._words import counted
from ..analysis import (
    attention_distances,
    attention_stability,
    exit_steps,
    fixed_points,
    inference_stages,
    stability,
    step_geometry,
    trajectories,
)
from ..analysis._prompts import check_finite
from ..analysis.inference_stages import METRICS
from ..errors import LoopedError
from ..patching import patch_sweep
from ..results import Grid
from ..sizes import human, sizes
from . import pointer_chasing
from .diagram import schedule_diagram
from .section import Figure, Question, Section, listed, measured, number, share
from .tables import facts, top_answers

SHOWN_POSITIONS = 32  # columns of a heat map over positions
LONGEST = 16  # characters of a token in a figure
SHOWN_HEADS = 64  # attention patterns on the page
SETTLED = 0.01  # of the norm of the state, in one loop
ONE_DIRECTION = 0.99  # cosine of states that are said to have one direction
ALIKE = 0.8  # a distance below this share of another one is said to be smaller
SHOWN_PASSES = 8  # named in a sentence
REPEATS = 0.8  # concordance of a curve with that of the loop before


def the_model(asked: Question, section: Section) -> None:
    """What the model is."""
    model, cfg = asked.model, asked.model.looped_cfg
    schedule, found = cfg.schedule, sizes(cfg)
    cache_bytes = found.cache_per_loop * model.cfg.dtype.itemsize
    share_of_one_loop = found.flops_per_loop / found.flops(cfg.n_loops)
    numbers = {
        "family": cfg.family,
        "n_loops": cfg.n_loops,
        "n_virtual_layers": schedule.n_layers,
        "n_physical_layers": cfg.n_physical,
        "n_parameters": found.n_parameters,
        "parameters": found.parameters,
        "flops_per_token": found.flops(cfg.n_loops),
        "flops_per_token_and_loop": found.flops_per_loop,
        "share_of_one_loop": share_of_one_loop,
        "cache_bytes_per_token_and_loop": cache_bytes,
        "d_model": cfg.d_model,
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.n_kv_heads,
        "d_head": cfg.d_head,
        "stacks": schedule.stacks,
        "l_cycles": cfg.l_cycles,
        "anchor_steps": cfg.anchor_steps if cfg.strategy == "anchored" else None,
        "d_vocab": cfg.d_vocab,
        "examples": asked.n_examples,
        "loops_looked_at": asked.n_loops,
    }
    section.numbers.update(numbers)
    section.reading.append(
        f"A token passes {counted(schedule.n_layers, 'layer')} with the weights of {cfg.n_physical}: "
        f"{schedule.describe().split(':')[0]}. The model has {human(found.n_parameters)} parameters, however often it loops."
    )
    section.reading.append(
        f"One loop costs a token {human(found.flops_per_loop, 'FLOP')}, {share(share_of_one_loop)} of an answer "
        f"after {counted(cfg.n_loops, 'loop')}, and {cache_bytes:,} bytes of keys and values. Loops are "
        "numbered from 0 on this page."
    )
    section.figures += [
        Figure("The order in which the layers run.", schedule_diagram(cfg)),
        Figure("Sizes and costs.", facts(model, found)),
    ]


def the_answers(asked: Question, section: Section) -> None:
    """What it would answer after each loop."""
    deep = asked.deep
    tokens, trained, n_loops = asked.shown, asked.model.n_loops, asked.n_loops
    n_pos = tokens.shape[1]
    first = max(0, n_pos - SHOWN_POSITIONS)
    best, probability, top = [], [], []
    k = min(4, deep.cfg.d_vocab)

    def keep(loop: int, logits: Tensor) -> None:
        check_finite(logits, f"the readout after loop {loop}")
        found = logits[0].float().softmax(-1)
        p, token = found[first:].max(-1)
        best.append(token.cpu())
        probability.append(p.cpu())
        top.append(found[-1].topk(k))

    with torch.no_grad():
        deep(tokens, on_loop=keep)
    answers, certain = torch.stack(best), torch.stack(probability)  # [loop, pos]
    words = asked.words(tokens[0, first:])
    last = answers[:trained, -1].tolist()
    settled = next(t for t in range(trained) if all(token == last[-1] for token in last[t:]))
    loops = [str(t) for t in range(n_loops)]
    positions = [str(p) for p in range(first, n_pos)]
    right = None if asked.hops is None else pointer_chasing.right_answers(tokens[0], n_loops)
    section.numbers |= {
        "prompt": asked.words(tokens[0]),
        "answers": [asked.words(row) for row in answers],
        "probabilities": Grid(certain, ("loop", "pos"), {"loop": loops, "pos": positions}, "probability"),
        "top_answers": [asked.words(found.indices) for found in top],
        "top_probabilities": [found.values for found in top],
        "settled_after_loop": settled,
        "changed_positions": int((answers[0] != answers[trained - 1]).sum()),
        "shown_positions": len(words),
    }
    begin, end = (
        _answer(asked, answers[0, -1], certain[0, -1]),
        _answer(asked, answers[trained - 1, -1], certain[trained - 1, -1]),
    )
    section.reading.append(
        f"If it stopped after loop 0, the model would continue the prompt with {begin}; after its last loop, {trained - 1}, "
        f"with {end}. " + ("It says so from loop 0 on." if settled == 0 else f"That answer is there from loop {settled} on.")
        if trained > 1
        else f"After its one loop the model continues the prompt with {end}."
    )
    if trained > 1:
        section.reading.append(
            f"Between these two loops the most probable token changes at {section.numbers['changed_positions']} of "
            f"{counted(len(words), 'position')} shown."
        )
    if n_loops > trained:
        beyond = _answer(asked, answers[-1, -1], certain[-1, -1])
        section.reading.append(f"Looped {n_loops} times, more often than it was made for, it says {beyond}.")
    if right is not None:
        pointer_chasing.read_answers(section, answers, right, trained, first)
    elif asked.hops is not None:
        section.reading.append(
            "This prompt has no right answers to compare with: those have a mapping that leads from each of its queries for as "
            "many hops as there are loops, such as “A b B c C a ? A”."
        )
    figure = _over_positions(section.numbers["probabilities"], words, "loop")
    longest = max(len(asked.word(token)) for token in {*answers.flatten().tolist()})
    wrong = torch.zeros_like(answers, dtype=torch.bool) if right is None else (right >= 0) & (right != answers)
    text = [
        [_short(asked.word(t)) + (" ✗" if w else "") for t, w in zip(*rows, strict=True)]
        for rows in zip(answers.tolist(), wrong.tolist(), strict=True)
    ]
    hover = "loop %{y}, position %{x}<br>%{text} %{z:.1%}<extra></extra>"
    figure.update_traces(
        text=text, texttemplate="%{text}", hovertemplate=hover, zmin=0, zmax=1, showscale=False, textfont={"size": 12}
    )
    if n_loops > trained:
        figure.add_hline(y=trained - 0.5, line={"width": 1.5, "dash": "dot", "color": "#d95f0e"})
    width = 70 + max(36, min(110, 14 + 9 * longest)) * len(words)
    caption = "The most probable next token at every position, if the model stopped after each loop; darker is more probable."
    if n_loops > trained:
        caption += f" Below the dotted line it loops more often than the {trained} times it was made for."
    if right is not None:
        caption += " ✗ marks answers to queries that are not the next hop."
    section.figures += [
        Figure(caption, figure, width),
        Figure("The most probable next tokens at the last position.", top_answers(asked, top, trained), 320),
    ]


def the_fixed_points(asked: Question, section: Section) -> None:
    """Whether the state settles."""
    trained = asked.model.n_loops
    for stack in asked.model.schedule.core_stacks:
        found = fixed_points(asked.deep, asked.prompts, n_loops=None, stack=stack, verbose=False)
        moved = found.successive["relative"].values.mean(-1)
        labels = found.successive["relative"].labels["loop"]
        half = len(moved) // 2
        rate = (float(moved[-1]) / max(float(moved[half]), 1e-300)) ** (1 / max(1, len(moved) - 1 - half))
        norms = found.norm.values.mean(-1)
        lowest = float(found.degeneracy.values[0])
        name, a_pass = ("", "Loop") if stack == "core" else (f"{stack}: ", "Pass")
        section.numbers[stack] = {
            "successive": found.successive,
            "distance": found.distance,
            "norm": found.norm,
            "layer_cosine": found.layer_cosine,
            "degeneracy": found.degeneracy,
            "moved_by_loop": moved,
            "norm_by_loop": norms,
            "rate_of_the_second_half": rate,
            "trained_loop": trained - 1,
        }
        own = f"loop {trained - 1} by {share(moved[trained - 2])}, " if stack == "core" and 2 < trained < asked.n_loops else ""
        last = f", {own}{a_pass.lower()} {labels[-1]} by {share(moved[-1])}" if len(moved) > 1 else ""
        section.reading.append(
            f"{name}{a_pass} {labels[0]} moves the state by {share(moved[0])} of its norm{last}: "
            + ("it has settled" if float(moved[-1]) < SETTLED else "it has not settled")
            + f" (less than {share(SETTLED)} would count as settled)."
            + (f" In the second half a step is on average {number(rate)} times the one before." if len(moved) > 2 else "")
            if bool(moved.isfinite().all())
            else f"{name}The state is zero, so it has no direction, and no step is a share of its norm."
        )
        section.reading.append(f"{name}The norm of the state goes from {number(norms[0])} to {number(norms[-1])}.")
        if lowest == lowest:  # a loop of one layer has no other layer
            section.reading[-1] += (
                f" At the end the state leaving another layer has a cosine of {number(lowest)} or more with that leaving the "
                f"first one: {'no layer turns it much' if lowest > ONE_DIRECTION else 'some layer turns it'}."
            )
        section.figures += [
            Figure(
                f"{name}How far each {a_pass.lower()} moves the state, over its norm.",
                _linear_if_narrow(found.plot("successive", "relative")),
            ),
            Figure(
                f"{name}How far the state is from where it is after {a_pass.lower()} {found.reference}, over the norm there; "
                "0 there by construction, which is left out.",
                _linear_if_narrow(found.plot("distance", "relative")),
            ),
            Figure(f"{name}The norm of the state, which a norm before the answer hides.", found.plot("norm")),
        ]


def the_trajectories(asked: Question, section: Section) -> None:
    """The path of the state."""
    loops, stack = asked.n_loops, asked.model.schedule.core_stacks[-1]

    def layers() -> None:
        found = trajectories(asked.deep, asked.shown, n_components=2, verbose=False)
        (path,) = found.paths
        section.numbers |= {"last_token": path.coordinates, "last_token_explained": path.explained}
        section.numbers["explained_by_two"] = float(path.explained.sum())
        section.reading.append(
            f"Two directions hold {share(path.explained.sum())} of the variance of the last token's states over "
            f"{counted(loops, 'loop')}."
        )
        section.figures.append(
            Figure(
                "The last token after every layer of every loop, in the plane of its first two principal components.",
                found.plot(),
            )
        )

    def ends() -> None:
        found = trajectories(asked.deep, asked.shown, over="loop_ends", stack=stack, n_components=2, verbose=False)
        (path,) = found.paths
        section.numbers |= {"loop_ends": path.coordinates, "loop_ends_explained": path.explained}
        section.figures.append(Figure("The states of all tokens at the ends of the loops, one path for each.", found.plot()))

    def steps() -> None:
        found = step_geometry(asked.deep, asked.of_length(3), stack=stack, verbose=False)
        cosine = found.step_cosine.values
        cosine = cosine[cosine.isfinite()]
        section.numbers |= {
            name: getattr(found, name) for name in ("step_norm", "step_cosine", "turning_angle", "anisotropy", "cka")
        }
        if len(cosine):  # a state that stands still has no direction
            section.numbers["mean_step_cosine"] = mean = float(cosine.mean())
            way = (
                "mostly goes on" if mean > 0.5 else "bends" if mean > 0.2 else "turns sideways" if mean > -0.2 else "turns back"
            )
            section.reading.append(
                f"From one step to the next the state {way}: the mean cosine between successive steps is {number(mean)} (1: "
                "straight on, 0: at a right angle, −1: back)."
            )
        section.figures.append(
            Figure(
                "How alike the states of two loops are over the tokens (linear CKA, 1: alike up to rotation and scale).",
                found.cka.plot("linear CKA"),
            )
        )

    for part in (layers, ends, steps):
        section.attempt(part)
    _left_out(asked, section, 3)


def the_attention(asked: Question, section: Section) -> None:
    """Attention across loops."""
    model, prompts = asked.model, asked.of_length(2)
    if prompts[0].shape[1] < 2:
        raise LoopedError("a prompt of one token was given, which can attend to nothing but itself; attention needs two.")
    stack = model.schedule.core_stacks[-1]
    changes: list[Grid] = []

    def distances() -> None:
        found = attention_distances(model, prompts, verbose=False)
        sites = model.schedule.sites
        at = [k for k, site in enumerate(sites) if site.loop is not None]
        same = [float(found.values[a, b]) for a in at for b in at if a < b and sites[a][::2] == sites[b][::2]]
        other = [float(found.values[a, b]) for a in at for b in at if a < b and sites[a][::2] != sites[b][::2]]
        section.numbers["distances"] = found
        if same and other:
            near, far = sum(same) / len(same), sum(other) / len(other)
            section.numbers |= {"same_layer_other_loop": near, "other_layer": far}
            how = "more than" if near < ALIKE * far else "less than" if far < ALIKE * near else "about as much as"
            section.reading.append(
                f"The patterns of one layer in two loops are {number(near)} apart on average, those of two layers "
                f"{number(far)} (Frobenius, per head and query): a layer resembles itself in other loops {how} it resembles "
                "other layers."
            )
        section.figures.append(
            Figure(
                "Distance between the attention patterns of any two executed layers (Frobenius, per head and query).",
                found.plot(),
                max(480, 200 + 9 * len(model.schedule.sites)),
            )
        )

    def changing() -> None:
        found = attention_stability(asked.deep, prompts, stack=stack, verbose=False)
        changes.append(found.successive)
        mean = found.successive.values.mean((1, 2))
        section.numbers |= {"successive": found.successive, "mean_change_by_loop": mean}
        section.numbers["mean_over_heads"] = found.successive.values.mean(-1)
        section.reading.append(
            f"From loop {int(found.successive.labels['loop'][0]) - 1} to {found.successive.labels['loop'][0]} a pattern "
            f"changes by {number(mean[0])} on average"
            + (f", at the last of {counted(len(mean) + 1, 'loop')} by {number(mean[-1])}." if len(mean) > 1 else ".")
        )
        section.figures.append(
            Figure("How far each pattern is from the one in the loop before, mean over heads.", found.plot())
        )

    def heads() -> None:
        tokens = asked.shown[:, :48]
        n_loops, n_layers, n_heads = model.schedule.n_loops_of(stack), model.schedule.stacks[stack], model.cfg.n_heads
        layer, loops = None, list(range(n_loops))
        if n_loops * n_layers * n_heads > SHOWN_HEADS and n_layers > 1:
            layer = int(changes[0].values.mean((0, 2)).argmax()) if changes else 0
        shown_layers = n_layers if layer is None else 1
        most = max(2, SHOWN_HEADS // (shown_layers * n_heads))
        if n_loops > most:
            loops = sorted({round(k * (n_loops - 1) / (most - 1)) for k in range(most)})
        prefix = "" if stack == "core" else f"{stack}."
        which = "*" if layer is None else str(layer)
        with torch.no_grad():
            _, cache = model.run_with_cache(
                tokens, names_filter=[f"{prefix}loops.{t}.blocks.{which}.attn.hook_pattern" for t in loops]
            )
        html = plots.attention_heads(cache, asked.words(tokens[0]), layer=layer, loops=loops, stack=stack).local_src
        what = "all layers" if layer is None else f"layer {layer}, the one whose patterns change most between loops"
        section.figures.append(
            Figure(
                "Attention of the first prompt in "
                f"{'all loops' if len(loops) == n_loops else 'loops ' + listed([*map(str, loops)])}, "
                f"{what} (circuitsvis). Rows are queries; point at a head to see it large.",
                html,
                700,
                is_light=True,
            )
        )
        section.numbers["patterns"] = {
            "loops": loops,
            "layers": list(range(n_layers)) if layer is None else [layer],
            "values": [
                [cache.stack_loops("pattern", j, t, stack)[0, 0] for j in (range(n_layers) if layer is None else [layer])]
                for t in loops
            ],
        }

    for part in (distances, changing, heads):
        section.attempt(part)
    _left_out(asked, section, 2)


def the_stages(asked: Question, section: Section) -> None:
    """Stages of inference in every loop."""
    found = inference_stages(asked.model, asked.of_length(2), verbose=False)
    section.numbers |= {metric: getattr(found, metric) for metric in METRICS} | {"repeats_from": REPEATS}
    titles = {
        "colsum": "how much of the attention goes to few tokens (ColSum concentration)",
        "sink_rate": "share of heads that attend to the first token",
        "mixing": "how widely a token looks (entropy of its attention)",
        "entropy": "how many directions the states take up (matrix entropy)",
        "norm": "norm of the state",
    }
    for stack in asked.model.schedule.core_stacks:
        name = "" if stack == "core" else f"{stack}: "

        def repeats(stack: str = stack, name: str = name) -> None:
            if asked.model.schedule.n_loops_of(stack) == 1:
                raise LoopedError("the model loops once, so there are no two loops whose curves could be alike.")
            scores = found.repetition(stack)
            mean = scores.values[..., 1].mean(0)  # concordance by metric
            section.numbers[f"repetition_{stack}"] = scores
            section.numbers[f"mean_concordance_{stack}"] = dict(zip(METRICS, mean.tolist(), strict=True))
            yes = [m for m, v in zip(METRICS, mean.tolist(), strict=True) if v >= REPEATS]
            no = [m for m, v in zip(METRICS, mean.tolist(), strict=True) if v < REPEATS]
            points = asked.model.schedule.stacks[stack]
            section.reading.append(
                f"{name}From one {'loop' if stack == 'core' else 'pass'} to the next, the curve over the layers stays about "
                f"the same (mean concordance of at least {REPEATS}; 1: the same curve) in "
                f"{listed(yes) if yes else 'none of the five measures'}"
                + (f"; it does not in {listed([f'{m} ({number(mean[METRICS.index(m)])})' for m in no])}." if no else ".")
                + (f" A curve over {points} layers has {points} points, so this says little." if points < 6 else "")
            )

        section.attempt(repeats)
    _left_out(asked, section, 2)
    for metric in METRICS:
        section.figures.append(Figure(f"{metric}: {titles[metric]}, one line per loop.", found.plot(metric, "recurrence")))


def the_stability(asked: Question, section: Section) -> None:
    """Beyond the loops it was trained for."""
    if asked.hops is not None:
        return pointer_chasing.accuracy_beyond(asked, section)
    trained = asked.model.n_loops
    found = stability(asked.deep, asked.of_length(2), n_loops=asked.n_loops, trained=trained, verbose=False)
    names = ("loss", "accuracy", "margin", "kl", "overthinking", "loss_change", "agreement")
    section.numbers |= {name: getattr(found, name) for name in names}
    loss, best = found.loss.values, int(found.loss.values.argmin())
    section.numbers |= {"trained": trained, "best_number_of_loops": best + 1}
    made_for, at_most = counted(trained, "loop"), counted(len(loss), "loop")
    costs = [f"{measured(found.loss, trained - 1)} nats each after {made_for}"]
    if best not in (trained - 1, len(loss) - 1):
        costs.append(f"the least, {number(loss[best])}, after {counted(best + 1, 'loop')}")
    if len(loss) > trained:
        costs.append(f"{measured(found.loss, -1)} after {at_most}")
    section.reading.append(
        f"Predicting the next tokens of the prompts costs {listed(costs)} ("
        + (
            f"mean and standard error over {found.loss.count} prompts)."
            if found.loss.count > 1
            else "one prompt, so no error)."
        )
    )
    _left_out(asked, section, 2)
    if len(loss) == trained:
        section.reading.append(f"{made_for} were asked for, which is what the model was made for; nothing lies beyond.")
    elif found.loss.count > 1:
        change, error = float(found.loss_change.values[-1]), float(found.loss_change.stderr[-1])
        verdict = "hurts" if found.overthinks else "helps" if change < -2 * error else "neither clearly hurts nor helps"
        section.reading.append(
            f"The change from {made_for} to {at_most} is {change:+.3g} ± {number(error)} nats, prompt by "
            f"prompt: looping on {verdict}."
        )
    if len(loss) > trained:
        section.numbers["agreement_trained_last"] = agree = float(found.agreement.values[trained - 1, -1])
        section.reading.append(
            f"After {at_most} the most probable token is that after {made_for} at {share(agree)} of the positions."
        )
    quality = found.plot()
    quality.for_each_annotation(lambda note: note.update(text=note.text.split(" (share")[0]))
    section.figures += [
        Figure(
            "Quality of the next-token predictions over the number of loops; overthinking is the share that was right after "
            "fewer loops and is wrong.",
            quality,
        ),
        Figure("Share of positions with the same answer after two numbers of loops.", found.agreement.plot("agreement")),
    ]


def the_exits(asked: Question, section: Section) -> None:
    """When it could stop."""
    model = asked.model
    if model.n_loops == 1:
        raise LoopedError("the model loops once, so there is no earlier loop to stop after.")
    policies: dict[str, exits.ExitPolicy] = {"KL < 5e-4": exits.KL(), "state moves < 3 %": exits.StateChange()}
    if model.looped_cfg.exit_gate:
        policies |= {f"gate ≥ {q}": exits.Gate(q) for q in (0.5, 0.9)}
    if asked.hops is None:
        prompts, answers, what = asked.of_length(2), None, "the next tokens of the prompts"
        _left_out(asked, section, 2)
    else:
        prompts, answers = [asked.hops.tokens], asked.hops.answers(model.n_loops)[-1, :, -1]
        what = (
            f"hop {model.n_loops} from the last query of {len(answers)} mappings, which only the last loop is trained to name,"
        )
    found = exit_steps(model, prompts, policies, answers=answers, verbose=False)
    section.numbers |= {"cost": found.cost, "accuracy": found.accuracy, "loss": found.loss}
    full = float(found.accuracy.values[-1])
    section.numbers["examples"] = found.accuracy.count
    section.reading.append(f"With all {counted(model.n_loops, 'loop')} the model names {what} in {share(full)} of the cases.")
    for k, name in enumerate(policies):
        cost, right = float(found.cost.values[k]), found.accuracy.values[k]
        section.reading.append(
            f"Leaving when “{name}” takes {number(cost)} loops per token and is right in {share(right)} of the cases."
            if cost < model.n_loops
            else f"“{name}” never leaves before the last loop."
        )
    section.figures.append(
        Figure(
            "What exit policies cost and keep, against a fixed number of loops for every token.",
            found.plot().update_yaxes(range=(-0.03, 1.03)),
        )
    )
    if found.pdf:
        words = asked.words(asked.shown[0])[-SHOWN_POSITIONS:]
        pdf = found.pdf[0][:, 0, -SHOWN_POSITIONS:]
        n_pos = asked.shown.shape[1]
        labels = {"loop": [str(t) for t in range(len(pdf))], "pos": [str(p) for p in range(n_pos - len(words), n_pos)]}
        section.numbers["gate_pdf"] = grid = Grid(pdf, ("loop", "pos"), labels, "probability of leaving")
        section.figures.append(
            Figure(
                "Where the exit gate of the model would leave, token by token.",
                _over_positions(grid, words, "loop"),
                110 + 30 * len(words),
            )
        )


def the_patches(asked: Question, section: Section) -> None:
    """Where the answer is made: patches from a clean into a corrupted run."""
    if asked.pair is None:
        return
    model, (clean, corrupted) = asked.model, asked.pair
    with torch.no_grad():
        clean_logits, corrupted_logits = model(clean), model(corrupted)
    right, wrong = int(clean_logits[0, -1].argmax()), int(corrupted_logits[0, -1].argmax())
    section.numbers |= {"clean": asked.words(clean[0]), "corrupted": asked.words(corrupted[0])}
    if right == wrong:
        raise LoopedError(
            f"both prompts are answered with {asked.word(right)!r}, so there is nothing for a patch to move; choose a "
            "corrupted prompt with another answer."
        )

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, right] - logits[0, -1, wrong]

    for stack in model.schedule.core_stacks:
        name = "" if stack == "core" else f"{stack}: "
        prefix = "" if stack == "core" else f"{stack}."
        with torch.no_grad():
            _, cache = model.run_with_cache(
                clean, names_filter=[f"{prefix}loops.*.blocks.*.hook_resid_pre", f"{prefix}loops.*.hook_out"]
            )
        words = asked.words(corrupted[0])
        pairs = [a if a == b else f"{a}→{b}" for a, b in zip(asked.words(clean[0]), words, strict=True)]
        before = patch_sweep(model, corrupted, cache, metric, stack=stack, verbose=False).normalised()
        after = patch_sweep(model, corrupted, cache, metric, "out", stack=stack, verbose=False).normalised()
        section.numbers[f"entering_layers_{stack}"], section.numbers[f"leaving_loops_{stack}"] = before, after
        per_loop = after.values.amax(-1)
        best = []
        section.numbers[f"restores_most_{stack}"] = places = after.values.argmax(-1).tolist()
        for t, at in enumerate(places):
            best.append(f"{t} at position {at}, {pairs[at]!r} ({share(per_loop[t])})")
        best = listed(best[:SHOWN_PASSES]) + (", ..." if len(best) > SHOWN_PASSES else "")
        if stack == model.schedule.core_stacks[0]:
            section.reading.append(
                f"The clean prompt is answered with {asked.word(right)!r}, the corrupted one with {asked.word(wrong)!r}. Each "
                "cell puts one state of the clean run into the corrupted one and reads how far the difference of these two "
                "logits goes from the corrupted run (0) to the clean one (1). Where a third answer wins, both logits are low "
                "and the cell is about half way."
            )
        section.reading.append(
            f"{name}Where the state leaving a {'loop' if stack == 'core' else 'pass'} restores most: after {best}."
        )
        section.figures += [
            Figure(
                f"{name}Patching the state entering each layer.",
                _over_positions(before, pairs, "loop · layer"),
                110 + 34 * len(pairs),
            ),
            Figure(
                f"{name}Patching the state leaving each loop.", _over_positions(after, pairs, "loop"), 110 + 34 * len(pairs)
            ),
        ]
    if asked.hops is not None:
        pointer_chasing.transplants(asked, section)


Part = Callable[[Question, Section], None]
SECTIONS: dict[str, tuple[str, Part]] = {
    "model": ("What the model is", the_model),
    "answers": ("What it would answer after each loop", the_answers),
    "patching": ("Where the answer is made", the_patches),
    "fixed_points": ("Does the state settle?", the_fixed_points),
    "trajectories": ("The path of the state", the_trajectories),
    "attention": ("Attention across loops", the_attention),
    "stages": ("Stages of inference in every loop", the_stages),
    "stability": ("Beyond the loops it was made for", the_stability),
    "exits": ("When it could stop", the_exits),
}


def _left_out(asked: Question, section: Section, least: int) -> None:
    """Say how many prompts were too short."""
    n = asked.n_examples - sum(map(len, asked.of_length(least)))
    if n and section.reading:
        section.numbers["left_out"] = n
        section.reading[-1] += f" Left out: {counted(n, 'prompt')} of fewer than {least} tokens."


def _linear_if_narrow(figure: Any) -> Any:
    """A logarithmic axis over less than a factor of four would have a label or two."""
    drawn = [v for trace in figure.data for v in trace.y if v is not None and math.isfinite(v)]
    if drawn and 0 < max(drawn) < 4 * min(drawn):
        figure.update_yaxes(type="linear", dtick=None, exponentformat=None, tickformat=None)
    return figure


def _answer(asked: Question, token: Tensor, probability: Tensor) -> str:
    return f"{asked.word(int(token))!r} ({share(probability)})"


def _short(word: str) -> str:
    """A token as plotly may show it in a cell: not too long, and no markup."""
    return escape(word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…", quote=False)


def _over_positions(grid: Grid, words: list[str], down: str) -> Any:
    """A heat map with the tokens below the positions."""
    figure = plots.heat_map(grid, " ")
    # Words repeat, and plotly would merge columns of one name: columns have numbers and the words are ticks.
    positions = [int(label.split()[-1]) for label in grid.labels["pos"]]  # a sweep's have the token first
    figure.update_traces(x=positions)
    angle = 0 if max(map(len, words)) < 4 else -60
    figure.update_xaxes(tickvals=positions, ticktext=[*map(_short, words)], title=None, side="top", tickangle=angle)
    return figure.update_yaxes(title=down)
