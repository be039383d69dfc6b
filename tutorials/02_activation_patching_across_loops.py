# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)][colab]
#
# # Activation patching across loops
#
# **Question.** In which loop, layer and position is a hop computed? And what does the state carry from one loop to the next:
# the symbol that was reached, the mapping, or both?
#
# **Experiment.** `toy:hop` follows pointers, one hop per loop (see the [quick start](01_quickstart.ipynb)). We change one pair
# of the prompt and patch clean activations back, cell by cell over loop, layer and position. Then we move whole states from
# loop to loop and from prompt to prompt, and hold attention still. Each time we first say what the task predicts.
#
# With another `MODEL` the sweeps, the transplants and the frozen attention run on two English prompts. The text is about
# `toy:hop`.
#
# *Outputs and numbers: `python tutorials/build.py 02_activation_patching_across_loops`, two cores of a server, November 2026.*
#
# [colab]: https://colab.research.google.com/github/tl-looped/tl_looped/blob/main/tutorials/02_activation_patching_across_loops.ipynb

# %%
try:
    import google.colab  # noqa: F401

    # %pip install -q 'tl-looped[viz]'
except ImportError:
    pass

# %%
from itertools import combinations

import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
import torch

from tl_looped import LoopedBridge
from tl_looped.interventions import freeze_attention
from tl_looped.patching import patch_between_loops, patch_sweep
from tl_looped.toys.hop import WORDS, HopPrompts, hop_prompts

MODEL = "toy:hop"  # on a GPU, for example "ByteDance/Ouro-1.4B"
HOP = MODEL == "toy:hop"  # the numbers in the text are those of this model
TOY = MODEL.startswith("toy:hop")  # the models that read pointers; others get English prompts
torch.set_grad_enabled(False)
pio.renderers.default = "plotly_mimetype+notebook_connected"

model = LoopedBridge.from_pretrained(MODEL, device="cpu" if TOY else None)  # else a GPU, where there is one
N_LOOPS = model.n_loops
LOOPS = [f"loop {t}" for t in range(N_LOOPS)]
SOME = slice(None, None, -(-N_LOOPS // 8))  # of many loops at most eight

# %% [markdown]
# ## Clean and corrupted
#
# The two prompts differ in one value: the one that the last query needs in its **third** hop, that is in loop 2. In the
# corrupted prompt this pointer jumps one symbol too far. The metric is a logit difference after the last loop: the clean answer
# (hop 6) minus the corrupted one.

# %%
FIRST_VALUE = WORDS.index("a")


def redirect(prompts, hop):
    """The same prompts, but the pair that the last query needs in one hop (from 1) jumps a symbol too far; and that pair."""
    symbols = torch.cat((prompts.queries[None], prompts.answers(8) - FIRST_VALUE))[..., -1]  # [hop, batch]
    needed = prompts.keys == symbols[hop - 1][:, None]
    values = torch.where(needed, symbols[hop + 1][:, None], prompts.values)
    return HopPrompts(prompts.keys, values, prompts.queries), needed.int().argmax(-1)


if TOY:
    prompts = hop_prompts(seed=3)
    other, pair = redirect(prompts, hop=3)
    clean, corrupted = prompts.tokens, other.tokens
    value_pos = 2 + 2 * int(pair)
    right, wrong = (int(p.answers(N_LOOPS)[-1, 0, -1]) for p in (prompts, other))
else:
    clean, corrupted = model.to_tokens("The capital of France is"), model.to_tokens("The capital of Italy is")
    right, wrong = (int(model.to_tokens(word, prepend_bos=False)[0, 0]) for word in (" Paris", " Rome"))
print("clean:    ", model.to_string(clean[0]), "->", model.to_string([right]))
print("corrupted:", model.to_string(corrupted[0]), "->", model.to_string([wrong]))


def metric(logits):
    answers = logits[0, -1].float()
    return answers[right] - answers[wrong]


_, clean_cache = model.run_with_cache(clean)

# %% [markdown]
# ## Loop × layer × position
#
# `patch_sweep` is `transformer_lens.patching` with a loop axis. One cell is one patched run. `normalised()` puts the corrupted
# run at 0 and the clean run at 1.
#
# **Prediction.** The third hop is read in loop 2. Before that, the information is at the changed value. After that, it is at
# the last query.

# %%
sweep = patch_sweep(model, corrupted, clean_cache, metric, site="resid_pre", stack="core", verbose=False)
print(f"clean {float(sweep.baseline_clean):.1f}, corrupted {float(sweep.baseline_corrupted):.1f}; {sweep.values.numel()} runs")
restored = sweep.normalised()  # [loop, layer, pos]
restored.plot(title="Clean residual stream patched into the corrupted run (resid_pre)").show()

# %% [markdown]
# **What it shows.** Two columns light up. The changed value (`g` in the corrupted prompt) matters until layer 0 of loop 2 has
# read it. The query matters from layer 1 of loop 2 on. So the hop is computed by **layer 0 in loop 2**, and nowhere else. All
# other positions stay below 0.1.
#
# A patch of the value in loop 0 does nothing, although the value is needed later. We come back to this: every pass is injected
# the prompt again.

# %% tags=["remove-cell"]
if HOP:
    grid = restored.values
    query = grid.shape[-1] - 1
    flat = grid.flatten(0, 1)  # [loop and layer, pos]; layer 0 of loop 2 is row 4
    assert model.to_string(corrupted[0, value_pos]) == "g" and clean[0, value_pos] != corrupted[0, value_pos]
    assert flat[4, value_pos] > 0.9 and flat[5:, value_pos].abs().max() < 0.1 and flat[:2, value_pos].abs().max() < 0.1
    assert flat[:5, query].abs().max() < 0.1 and flat[5:, query].min() > 0.9
    rest = [p for p in range(query) if p != value_pos]
    assert flat[:, rest].abs().max() < 0.1

# %% [markdown]
# ## Heads
#
# The same for the output of attention heads (`site="z"`, all positions at once): first each head alone, then all heads of a
# layer together. Then every choice of one to four heads of layer 0 in loop 2, on 200 other prompts:
# in how many does the patch restore more than half of the logit difference?

# %%
by_head = patch_sweep(model, corrupted, clean_cache, metric, site="z", stack="core", verbose=False).normalised()
by_head.plot(title="One head patched").show()
by_layer = patch_sweep(model, corrupted, clean_cache, metric, site="z", axes=("loop", "layer"), stack="core", verbose=False)
by_layer = by_layer.normalised()
by_layer.plot(title="All heads of a layer patched").show()

# %%
FIGURE = {"template": "plotly_white", "height": 340}

if TOY:
    one = hop_prompts(200, seed=100)
    changed, _ = redirect(one, hop=3)
    a, b = (p.answers(N_LOOPS)[-1, :, -1:] for p in (one, changed))
    z_name = "loops.2.blocks.0.attn.hook_z"
    one_logits, one_cache = model.run_with_cache(one.tokens, names_filter=z_name)

    def difference(logits):
        return (logits[:, -1].gather(1, a) - logits[:, -1].gather(1, b))[:, 0]  # [prompt]

    def patch_heads(heads):
        def hook_fn(z, hook):
            z[:, :, heads] = one_cache[z_name][:, :, heads]
            return z

        return [(z_name, hook_fn)]

    low, high = difference(model(changed.tokens)), difference(one_logits)
    layout = FIGURE | {"title": "Clean heads of layer 0 in loop 2", "legend_title": "clean heads", "barmode": "overlay"}
    figure = go.Figure(layout=layout)
    by_choice = {}  # of k clean heads: what every choice restores, [choice, prompt]
    for k in range(1, 5):
        choices = list(combinations(range(4), k))
        runs = [model.run_with_hooks(changed.tokens, fwd_hooks=patch_heads(list(heads))) for heads in choices]
        by_choice[k] = torch.stack([(difference(logits) - low) / (high - low) for logits in runs])
        values = (by_choice[k] > 0.5).float().mean(1).tolist()
        figure.add_bar(x=[", ".join(map(str, heads)) for heads in choices], y=values, name=str(k))
        print(f"{k} clean: {sum(values) / len(values):.3f} on average;", " ".join(f"{value:.3f}" for value in values))
    figure.update_xaxes(title="which heads are clean", type="category")
    figure.update_yaxes(title="prompts restored by more than half").show()

# %% [markdown]
# **What it shows.** On this prompt no head of loop 2 alone restores anything: each stays below 0.05. All four together restore
# everything. A sweep over single heads would have found nothing here.
#
# The 200 prompts show a threshold: more than nine patches in ten restore nearly everything or nearly nothing. One clean head is
# hardly ever enough (less than 5 % of the cases), three nearly always are (more than 95 %). Two are in a little more than half
# of the cases, and it depends on which two: from less than 45 % to more than 65 %.
#
# In later loops a patch of layer 0 also restores the answer. It is not the third hop that is computed there: the patch brings
# in the clean lookups of *later* hops, which overwrite the wrong symbol. To see where a hop is computed, patch what is read,
# not what is written.

# %% tags=["remove-cell"]
if HOP:
    assert by_head.values[2].abs().max() < 0.05 and by_layer.values[2, 0] > 0.9
    one_clean, two, three, four = ((shares > 0.5).float().mean(1) for shares in by_choice.values())
    assert one_clean.mean() < 0.05 and 0.5 < two.mean() < 0.62 and three.mean() > 0.95 and four == 1
    assert two.min() < 0.45 and two.max() > 0.65
    every = torch.cat(list(by_choice.values()))
    assert ((every - 0.5).abs() > 0.4).float().mean() > 0.9
    assert (
        by_layer.values[:2].abs().max() < 0.1 and by_layer.values[:, 1].abs().max() < 0.1 and by_layer.values[3:, 0].min() > 0.8
    )

# %% [markdown]
# ## Every hop has its loop
#
# So we patch what is read: the values `v` of layer 0 at the changed pair. We do it for pairs needed in hop 1, 2, ... 6, and
# take the mean over eight prompts.
#
# **Prediction.** A diagonal: hop `k` is read in loop `k - 1`.

# %%
if TOY:
    table = torch.zeros(6, N_LOOPS)
    for seed in range(8):
        one = hop_prompts(seed=100 + seed)
        _, one_cache = model.run_with_cache(one.tokens, names_filter="loops.*.blocks.0.attn.hook_v")
        for hop in range(1, 7):
            changed, pair = redirect(one, hop)
            a, b = (int(p.answers(N_LOOPS)[-1, 0, -1]) for p in (one, changed))
            found = patch_sweep(
                model,
                changed.tokens,
                one_cache,
                lambda logits, a=a, b=b: logits[0, -1, a] - logits[0, -1, b],
                site="v",
                axes=("loop",),
                layers=0,
                positions=2 + 2 * int(pair),
                verbose=False,
            )
            table[hop - 1] += found.normalised().values / 8
    figure = px.imshow(
        table.tolist(), x=LOOPS, y=[f"hop {k}" for k in range(1, 7)], color_continuous_scale="Blues", aspect="auto"
    )
    figure.update_layout(
        template="plotly_white", height=340, title="Values of layer 0 patched at the pair that a hop needs"
    ).show()

# %% [markdown]
# **What it shows.** A diagonal. On it the patch restores more than 90 % of the clean logit difference on average, elsewhere
# less than 10 %. One layer with one set of weights computes all six hops, and *when* it does is decided by the state.

# %% tags=["remove-cell"]
if HOP:
    off = table[~torch.eye(6, dtype=torch.bool)]
    assert table.diag().min() > 0.9 and off.abs().max() < 0.1

# %% [markdown]
# ## From loop to loop: is there a counter?
#
# A state after loop `s` is written over the state after loop `t`, at the queries. Then the run goes on to loop 5.
#
# **Prediction.** If the state is the symbol reached and the model does not count loops, the written state has made `s + 1`
# hops, and `5 - t` more follow. The final answer is hop `6 + s - t`. If the model knows which loop it is in, something else
# happens.
#
# The mappings are cycles through eight symbols, so every answer is one of the hops 1 to 8, and hop 9 is hop 1 again. The metric
# is the mean number of the hop that was answered. For another model it is the logit difference of before, and the state is that
# of the last position.

# %%
if TOY:
    many = hop_prompts(64, seed=11)
    hops = many.answers(8)  # [hop, batch, query]

    def which_hop(logits):
        answers = logits[:, many.query_pos].argmax(-1)
        return (answers == hops).float().argmax(0).add(1.0).mean()

    moved = patch_between_loops(model, many.tokens, which_hop, site="out", positions=many.query_pos, verbose=False)
else:
    moved = patch_between_loops(model, clean, metric, site="out", loops=SOME, positions=slice(-1, None), verbose=False)


def plot_moved(values, measure, title):
    figure = px.imshow(
        values.tolist(), x=LOOPS[SOME], y=LOOPS[SOME], text_auto=".2f", color_continuous_scale="Viridis", aspect="auto",
        labels={"x": "written over the state after", "y": "state after", "color": measure},
    )  # fmt: skip
    figure.update_layout(template="plotly_white", height=380, title=title).show()


plot_moved(moved.values, *(("hop", "Hop answered at the end") if TOY else ("logits", "Logit difference at the end")))

# %% [markdown]
# **What it shows.** The prediction holds in all 36 cells. Moving a state one loop later costs one hop, moving it earlier gains
# one. There is no counter: every loop does the same thing to whatever state it gets. The diagonal patches a run with itself,
# and changes nothing.

# %% tags=["remove-cell"]
if HOP:
    s, t = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    expected = (6 + s - t - 1) % 8 + 1
    assert (moved.values - expected).abs().max() < 0.02
    assert (moved.values.diag() == moved.baseline_corrupted).all()

# %% [markdown]
# ## From prompt to prompt: the state at a query is the symbol reached
#
# Now the states come from a run with **another mapping**. After loop 2 we give all queries the states that they have in that
# run.
#
# **Prediction.** If the state at a query is the symbol reached, and nothing else, then the answer after loop 2 is the *other*
# run's. All later answers are hops from there in the prompt's *own* mapping.
#
# We count lookups: is the answer after a loop what a mapping gives for the answer one loop before?
#
# For another model, the state of the last position moves from the clean into the corrupted prompt, for all pairs of loops.

# %%
INJECTED = model.looped_cfg.injection != "none"
if TOY:
    here, there = hop_prompts(64, seed=11), hop_prompts(64, seed=12)
    names = ["loops.*.hook_out", *(["loops.*.hook_injection"] if INJECTED else [])]
    _, there_cache = model.run_with_cache(there.tokens, names_filter=names)

    def transplant(positions):
        """A hook that takes some positions from the run of the other prompts."""

        def hook_fn(value, hook):
            value[:, positions] = there_cache[hook.name][:, positions]
            return value

        return hook_fn

    def answers_with(hooks):
        """The answers after every loop, [loop, batch, query]."""
        found = []
        model.run_with_hooks(
            here.tokens, fwd_hooks=hooks, on_loop=lambda loop, logits: found.append(logits[:, here.query_pos].argmax(-1))
        )
        return torch.stack(found)

    def lookups(prompts, answers):
        """For every loop but the first: share of answers that the prompts' mapping gives for the answer one loop before."""
        value = torch.zeros(len(prompts.keys), len(WORDS), dtype=torch.long)
        value.scatter_(1, prompts.keys + FIRST_VALUE, prompts.values + FIRST_VALUE)
        expected = torch.stack([value.gather(1, before) for before in answers[:-1]])
        return (expected == answers[1:]).float().mean((1, 2))

    def plot_lookups(answers, title):
        figure = go.Figure(layout={"template": "plotly_white", "xaxis_title": "loop", "yaxis_title": "share of lookups"})
        for name, prompts in (("in the prompt's own mapping", here), ("in the other mapping", there)):
            shares = lookups(prompts, answers)
            figure.add_scatter(x=list(range(1, N_LOOPS)), y=shares.tolist(), name=name)
            print(f"{name:28}", " ".join(f"{share:.2f}" for share in shares))
        figure.update_layout(title=title, height=340, yaxis_range=[-0.03, 1.03]).show()

    queries, pairs = here.query_pos, slice(0, here.query_pos.start)
    found = answers_with([("loops.2.hook_out", transplant(queries))])
    as_there = (found[2] == there.answers(3)[2]).float().mean()
    print(f"after loop 2 the answer is the other run's in {as_there:.0%} of the cases")
    plot_lookups(found, "States of the queries after loop 2 from another mapping")
else:
    crossed = patch_between_loops(
        model, corrupted, metric, site="out", source_tokens=clean, loops=SOME, positions=slice(-1, None), verbose=False
    )
    plot_moved(crossed.normalised().values, "restored", "State of the clean prompt written into the corrupted one")

# %% [markdown]
# **What it shows.** As predicted, in more than 99 % of the cases. There is one jump, from the old symbol to the transplanted
# one, in loop 2. Before and after it the model chases in its own mapping. The query carries a place, and no map. The same holds
# for a transplant after any other loop.

# %% tags=["remove-cell"]
if HOP:
    for loop in range(5):
        chased = answers_with([(f"loops.{loop}.hook_out", transplant(queries))])
        assert torch.equal(chased[:loop], answers_with([])[:loop])
        assert (chased[loop] == there.answers(loop + 1)[loop]).float().mean() > 0.99
        own, foreign = lookups(here, chased), lookups(there, chased)
        jump = [loop - 1] if loop else []
        assert all(own[t] < 0.3 if t in jump else own[t] > 0.99 for t in range(5)) and foreign.max() < 0.3

# %% [markdown]
# ## The mapping is held by the state at the pairs, and restored by the injection
#
# Where is the map, then? At the pairs. But each pass also gets the prompt *injected* again. So there are two sources. We take
# from the other run, at the pairs only:
#
# 1. the state after loop 0,
# 2. the injection of loops 1 to 5,
# 3. both.

# %%
if TOY and INJECTED:
    state, injections = ("loops.0.hook_out", transplant(pairs)), ("loops.1:.hook_injection", transplant(pairs))
    cases = {"state": [state], "injection": [injections], "state and injection": [state, injections]}
    shares = {name: answers_with(hooks) for name, hooks in cases.items()}
    for name, answers in shares.items():
        plot_lookups(answers, f"At the pairs, from another mapping: {name}")

# %% [markdown]
# **What it shows.**
#
# 1. *State.* In loop 1 the two mappings contradict each other, and the model is right in its own mapping in little more than
# half of its lookups. Then the injection writes the prompt's mapping back: the share rises with every loop, to above 0.99 in
# loop 5.
# 2. *Injection.* The mirror image. The state remembers the old mapping for a while, and the injected one wins: above 0.9 in
# loop 5.
# 3. *Both.* The model chases in the other mapping from loop 1 on, in more than 99 % of the lookups, from the symbol where its
# own first hop has led it.
#
# So the state at the pairs holds the mapping that is read, and the injection restores it. That is why the patch of the first
# sweep did nothing in loop 0: by loop 2, two injections had overwritten it.

# %% tags=["remove-cell"]
if HOP:
    own, foreign = lookups(here, shares["state"]), lookups(there, shares["injection"])
    assert 0.5 < own[0] < 0.6 and own[-1] > 0.99 and (own.diff() > 0).all()
    assert foreign[0] < 0.6 and foreign[-1] > 0.9 and (foreign.diff() > 0).all()
    assert lookups(there, shares["state and injection"]).min() > 0.99
    assert torch.equal(shares["state and injection"][0], answers_with([])[0])

    def at_the_value(value, hook):
        value[:, value_pos] = clean_cache[hook.name][:, value_pos]
        return value

    entering, twice = ("loops.0.blocks.0.hook_resid_pre", at_the_value), ("loops.1:3.hook_injection", at_the_value)
    low, high = sweep.baseline_corrupted, sweep.baseline_clean
    assert abs(metric(model.run_with_hooks(corrupted, fwd_hooks=[entering])) - low) < 0.1 * (high - low)
    assert metric(model.run_with_hooks(corrupted, fwd_hooks=[entering, twice])) > low + 0.9 * (high - low)

# %% [markdown]
# ## Freeze attention
#
# `freeze_attention(model, from_loop=t)` lets all later loops look where loop `t` looked. Values and everything else are their
# own.
#
# **Prediction.** If a hop is the act of looking at another place, then a model that cannot look elsewhere stays at hop `t + 1`.
#
# For another model, all layers are frozen from one loop on, and the metric is read at the end of the clean and the corrupted
# run.

# %%
if TOY:
    layout = FIGURE | {"xaxis_title": "loop", "yaxis_title": "right answers"}
    figure = go.Figure(layout=layout | {"title": "Attention frozen from loop 2 on"})
    for name, layers in (("no layer", []), ("layer 0", 0), ("layer 1", 1)):
        hooks = freeze_attention(model, from_loop=2, layers=layers) if name != "no layer" else []
        answers = answers_with(hooks)
        correct = (answers == here.answers(6)).float().mean((1, 2))
        stays = (answers[3:] == here.answers(3)[2]).float().mean((1, 2))
        figure.add_scatter(x=list(range(6)), y=correct.tolist(), name=f"{name} frozen")
        print(f"{name:9} right:", " ".join(f"{c:.2f}" for c in correct), "  still hop 3:", " ".join(f"{c:.2f}" for c in stays))
else:
    layout = FIGURE | {"xaxis_title": "attention frozen from loop", "yaxis_title": "logit difference at the end"}
    figure = go.Figure(layout=layout | {"title": "The last point has nothing frozen"})
    starts = [*range(N_LOOPS - 1)[SOME], N_LOOPS - 1]
    for name, ids in (("clean", clean), ("corrupted", corrupted)):
        values = [float(metric(model.run_with_hooks(ids, fwd_hooks=freeze_attention(model, from_loop=t)))) for t in starts]
        figure.add_scatter(x=starts, y=values, name=name, mode="lines+markers")
figure.show()

# %% [markdown]
# **What it shows.** With the attention of layer 0 frozen, more than 90 % of the answers stay at hop 3, in each of the three
# loops that follow. Layer 1 can be frozen without any loss. The step is made by where layer 0 looks.

# %% tags=["remove-cell"]
if HOP:
    for start in range(5):
        still = answers_with(freeze_attention(model, from_loop=start, layers=0))[start + 1 :]
        assert (still == here.answers(6)[start]).float().mean((1, 2)).min() > 0.9
        assert (answers_with(freeze_attention(model, from_loop=start, layers=1)) == here.answers(6)).float().mean() > 0.99

# %% [markdown]
# ## What this does not show
#
# - That a language model divides its labour over loops in this way. The toy has one loss per loop, and its task has one step
#   per loop. In a language model, start with the first sweep. Columns as clean as these are not to be expected.
# - What layer 1 and the MLPs are for. Patching says what is needed for *this* difference between prompts. See exercise 2.
# - That the four heads are the same. They are redundant in this test, no more.
#
# ## Exercises
#
# **1.** Patch `site="injection"` and `site="state"` over (loop, position) with the clean and corrupted prompt of the first
# sweep. Where do they act?
#
# <details><summary>Answer</summary>
#
# Both act at the changed value in loop 2, where it is read. At the query, the state acts from loop 3 on: it is the symbol
# reached. The injection does nothing there: the query's own token no longer matters.
#
# </details>
#
# **2.** Leave out the MLP of layer 0 in all loops (`("loops.*.blocks.0.hook_mlp_out", lambda x, hook: 0 * x)`). Is it needed?
#
# <details><summary>Answer</summary>
#
# Hardly: more than 97 % of the answers stay right in every loop. The chase is done by attention.
#
# </details>
#
# **3.** Do the transplant of the queries with `toy:hop-noinject`, but of *all* positions. What do you predict for the answers
# that follow?
#
# <details><summary>Answer</summary>
#
# Without injection the state is all there is. With the state of all positions, the run continues as the other run, bit for bit.
#
# </details>

# %% tags=["remove-cell"]
if HOP:
    by_site = {
        site: patch_sweep(model, corrupted, clean_cache, metric, site=site, verbose=False).normalised().values
        for site in ("state", "injection")
    }
    assert all(values[2, value_pos] > 0.9 and values[3:, value_pos].abs().max() < 0.1 for values in by_site.values())
    assert by_site["state"][3:, -1].min() > 0.9 and by_site["state"][:3, -1].abs().max() < 0.1
    assert by_site["injection"][:, -1].abs().max() < 0.1
    no_mlp = answers_with([("loops.*.blocks.0.hook_mlp_out", lambda x, hook: 0 * x)])
    assert (no_mlp == here.answers(6)).float().mean((1, 2)).min() > 0.97
    bare = LoopedBridge.from_pretrained("toy:hop-noinject", device="cpu")
    bare_logits, bare_cache = bare.run_with_cache(there.tokens)
    name = "loops.2.hook_out"
    assert torch.equal(bare.run_with_hooks(here.tokens, fwd_hooks=[(name, lambda x, hook: bare_cache[name])]), bare_logits)
