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
# # Fixed points and stages of inference
#
# **Question.** A looped model runs the same layers again and again. Does its state settle? And does every pass do the same
# work, as an ordinary model does once from its first layer to its last?
#
# **Experiment.** "A Mechanistic Analysis of Looped Reasoning Language Models" (arXiv 2604.11791) asks this of Ouro, Huginn and
# retrofitted models. We follow it figure by figure on `toy:text`, a small language model that comes with the package, and on
# models with random weights. The paper's answers need not hold for the toy; that is what we look at. A table at the end says
# which figures are here and which are not.
#
# *Outputs and numbers: `python tutorials/build.py 04_fixed_points_and_stages`, two cores of a server, November 2026.*
#
# [colab]: https://colab.research.google.com/github/tl-looped/tl_looped/blob/main/tutorials/04_fixed_points_and_stages.ipynb

# %%
try:
    import google.colab  # noqa: F401

    # %pip install -q 'tl-looped[viz]'
except ImportError:
    pass

# %%
import plotly.graph_objects as go
import plotly.io as pio
import torch
from plotly.subplots import make_subplots

from tl_looped import LoopedBridge
from tl_looped.analysis import (
    attention_distances,
    fixed_points,
    inference_stages,
    limiting_behaviour,
    looped_floorplan,
    more_loops,
    random_init_sweep,
    trajectories,
)
from tl_looped.analysis.stage_order import repetition, resemblance, spread
from tl_looped.figures import floorplan, grouped
from tl_looped.interventions import ablate
from tl_looped.results import Grid
from tl_looped.schedule import Site
from tl_looped.toys.text import WINDOW, corpus, encode, untrained, windows

MODEL = "toy:text"  # on a GPU, for example "ByteDance/Ouro-1.4B"
TOY = MODEL == "toy:text"  # the numbers in the text are those of this model
FAR = 128  # loops of the runs that look for a fixed point, as in the paper
N_WINDOWS = 22 if TOY else 4  # of held-out text; more on a large GPU
torch.set_grad_enabled(False)
if TOY:
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
pio.renderers.default = "plotly_mimetype+notebook_connected"
style = pio.templates["plotly_white"].layout  # every figure holds a copy: only what is used here
used = ("colorway", "font", "paper_bgcolor", "plot_bgcolor", "title", "xaxis", "yaxis")
pio.templates["plotly_white"] = go.layout.Template(layout={key: style[key] for key in used})


def beside(**figures):
    """Figures side by side, with at most 32 points a line."""
    titles = [name.replace("_", " ") for name in figures]
    whole = make_subplots(1, len(figures), subplot_titles=titles, horizontal_spacing=0.09)
    for k, figure in enumerate(figures.values(), 1):
        for trace in figure.data:
            every = -(-len(trace.y) // 32)
            x = list(range(len(trace.y)) if trace.x is None else trace.x)[::every]
            y = [None if v is None else float(f"{v:.4g}") for v in trace.y[::every]]
            mode = "lines+markers" if len(x) < 24 else "lines"
            trace.update(x=x, y=y, mode=mode, showlegend=k == len(figures) and trace.showlegend is not False)
            whole.add_trace(trace, row=1, col=k)
        whole.update_xaxes(title=figure.layout.xaxis.title.text, col=k)
        whole.update_yaxes(type=figure.layout.yaxis.type, exponentformat="power", col=k)
    return whole.update_layout(template="plotly_white", height=280, margin={"t": 40, "b": 50})


# %% [markdown]
# `toy:text` was trained on the documentation of Python: one layer of prelude, three looped layers, four loops, one layer of
# coda, norms before attention and MLP, no injection, and a loss on the last output only. We use text that was held out.

# %%
model = LoopedBridge.from_pretrained(MODEL, device="cpu" if TOY else None)  # else a GPU, where there is one
ids = encode(model.tokenizer, corpus(held_out=True))
tokens = windows(ids, torch.arange(1, len(ids) - WINDOW, 8 * WINDOW)[:N_WINDOWS])  # [batch, pos], each row begins with BOS
if (bos := model.tokenizer.bos_token_id) is None:
    tokens = tokens[:, 1:]
else:
    tokens[:, 0] = bos
tokens = tokens.to(model.cfg.device)
few = tokens[:8]  # for the long runs
schedule = model.schedule
print(schedule)
print("windows and positions:", tuple(tokens.shape))
print(model.to_string(tokens[0, 1:40]))

# %% [markdown]
# ## Does the state settle? (figures 3 and 4)
#
# `X[t, l]` is the residual stream leaving layer `l` in loop `t`. Figure 3 is its distance to the loop before. Figure 4 is its
# distance to `X*`, the state in the last of 128 loops. The model was trained for four.

# %%
found = fixed_points(model, few, n_loops=FAR, patterns=True, verbose=False)
beside(
    relative_to_the_loop_before=found.plot("successive"), relative_to_the_last=found.plot("distance"), norm=found.plot("norm")
)

# %%
for loop in (1, 3, 7, 15, 31, 63, 127):
    step = {name: found.successive[name].values[loop - 1].mean() for name in ("l2", "relative")}
    far = {name: found.distance[name].values[loop].mean() for name in ("relative", "cosine")}
    print(f"loop {loop:3}: step {step['l2']:5.2f}, relative {step['relative']:.3f};", end=" ")
    print(f"to X* {far['relative']:.3f}, cosine {far['cosine']:.3f}; norm {found.norm.values[loop].mean():6.1f}")

# %% [markdown]
# **What it shows.** The relative step falls in every loop, which looks like convergence. It is not. The step itself stays near
# 2, and the norm grows in every loop: 104 after loop 63, 219 after loop 127. A growing norm makes every step look smaller. So
# look at a norm beside every relative distance. Figure 4 shows it, too: half way to `X*`, in loop 63, the state is still 60 %
# of its norm away. The curve reaches 0 at its end by construction; `X*` is where the run was stopped, no fixed point.
#
# The paper finds fixed points in the models that inject the prompt in every loop, and none in Ouro, which does not inject.
# `toy:text` does not inject either.

# %% tags=["remove-cell"]
if TOY:
    l2, relative, norm = (e.values.mean(1) for e in (found.successive["l2"], found.successive["relative"], found.norm))
    assert (relative.diff() < 0).all() and relative[-1] < 0.011
    assert 1.7 < l2[10:].min() and l2[10:].max() < 2.3  # l2[t - 1] is the step to loop t
    assert (norm.diff() > 0).all() and 103 < norm[63] < 106 and 217 < norm[127] < 220
    assert 0.58 < found.distance["relative"].values[63].mean() < 0.61

# %% [markdown]
# ## In which direction does it go? (figures 22 and 24)
#
# Cosines ignore the norm. Figure 24 is the cosine of the state and the state one loop before, figure 22 that with `X*`.

# %%
beside(to_the_loop_before=found.plot("successive", "cosine"), to_the_last_loop=found.plot("distance", "cosine"))

# %% [markdown]
# And the steps? We compare the directions of the steps `X[t] - X[t - 1]` of all loops, at the last 16 positions.

# %%
deep = model.unroll(FAR)
states = []
ends = [f"loops.{t}.blocks.{schedule.n_core - 1}.hook_resid_post" for t in range(FAR)]
deep.run_with_hooks(few, fwd_hooks=[(name, lambda x, hook: states.append(x[:, -16:].float().cpu())) for name in ends])
steps = torch.nn.functional.normalize(torch.stack(states).diff(dim=0), dim=-1).flatten(1, 2)  # [loop, token, d_model]
turn = torch.einsum("and,bnd->ab", steps, steps) / steps.shape[1]  # mean over tokens; [0, 0] is the step to loop 1
thin = [str(t) for t in range(1, FAR, 14)]
Grid(turn[::14, ::14], ("step to loop", "other"), {"step to loop": thin, "other": thin}, "cosine").plot(
    title="Cosine between the steps of two loops"
)

# %%
for a, b in ((15, 16), (62, 63), (15, 60), (31, 60), (63, 127), (15, 127)):
    print(f"steps to loops {a:2} and {b:3}: cosine {turn[a - 1, b - 1]:.4f}")
cosine = found.successive["cosine"].values.mean(1)
print(f"states in loops 62 and 63: {cosine[62]:.4f}; degeneracy (see below): {found.degeneracy.values[0]:.4f}")

# %% [markdown]
# **What it shows.** Each step goes almost where the one before went: cosine 0.9999 from loop 62 to 63. Yet the path turns
# slowly. Between the steps to loops 15 and 60 the cosine is 0.50, between 31 and 60 0.83. A cosine near 1 between neighbours
# does not mean that a direction is kept.

# %% tags=["remove-cell"]
if TOY:
    assert turn[61, 62] > 0.9998 and turn[14, 15] > 0.998 and cosine[62] > 0.9995
    assert abs(turn[14, 59] - 0.50) < 0.02 and abs(turn[30, 59] - 0.83) < 0.02 and turn[14, 126] < 0.35
    assert found.degeneracy.values[0] > 0.9999

# %% [markdown]
# ## Where does each token end? (appendix C)
#
# `limiting_behaviour` judges every token by its cosine to its last state. It is *fixed* if the cosine is above 0.95 in nine
# tenths of the loops (the first quarter is left out), a *slider* if the cosine rises steadily to the end, an *orbit* if it
# leaves and returns. The body of the paper's algorithm is not public; this is a reconstruction.

# %%
ending = limiting_behaviour(model, few, n_loops=FAR, verbose=False)  # .plot() has the shares in all layers
counts = dict(zip(ending.counts.labels["label"], ending.counts.values[-1].tolist(), strict=True))
print("tokens, last looped layer:", counts)
print("of which fixed at the first position:", sum(int(e.labels[-1, 0] == 0) for e in ending.examples))

# %% [markdown]
# **What it shows.** 1,005 of 1,024 tokens slide, none is on an orbit. 19 count as fixed, and the 8 first positions (`<s>`) are
# among them. This label looks at directions only, so it does not say that their norm stays. The result agrees with the turn
# above.

# %% tags=["remove-cell"]
if TOY:
    assert counts == {"fixed": 19, "orbit": 0, "slider": 1005, "unknown": 0, "undefined": 0}
    assert all(e.labels[-1, 0] == 0 for e in ending.examples) and len(ending.examples) == 8

# %% [markdown]
# ## The path of one token (figures 5 and 26 to 28)
#
# The states of the last token over all layers of 16 loops, in their own first two principal components.

# %%
path = trajectories(model, few, n_loops=16, verbose=False)
path.plot().update_layout(height=300)

# %%
n_before, n_core = schedule.n_prelude, schedule.n_core
along = [p.coordinates.values[n_before : n_before + 16 * n_core, 0][n_core - 1 :: n_core] for p in path.paths]
one_way = sum(bool((x.diff() > 0).all() or (x.diff() < 0).all()) for x in along)
print(f"first component: {path.explained.values[0]:.0%} of the variance, mean of {len(along)} windows")
print(f"windows in which the ends of the 16 loops move one way along it: {one_way}")

# %% [markdown]
# **What it shows.** A bent line that is passed once, not a cycle. The first component holds 93 % of the variance, and the ends
# of the loops move one way along it in all eight windows. The paper shows a closed cycle for the retrofitted Llama.

# %% tags=["remove-cell"]
if TOY:
    assert 0.92 < path.explained.values[0] < 0.935 and one_way == 8

# %% [markdown]
# ## Does attention settle? (figures 23 and 25)
#
# The same two distances, of attention patterns: to the loop before (figure 25) and to the last loop (figure 23).


# %%
def by_layer(grid):
    at = [Site(found.stack, int(t), int(j)) for t in grid.labels["loop"] for j in grid.labels["layer"]]
    layers = [found.schedule.virtual(site) for site in at]
    return grouped(
        grid.values.flatten().tolist(), found.schedule, layers=layers, group_by="layer", name="Frobenius distance", log_y=True
    )


beside(to_the_loop_before=by_layer(found.pattern_successive), to_the_last_loop=by_layer(found.pattern_distance))

# %%
for loop in (1, 3, 7, 15, 31, 63, 127):
    to_before, to_last = found.pattern_successive.values[loop - 1].mean(), found.pattern_distance.values[loop].mean()
    print(f"loop {loop:3}: to the loop before {to_before:.4f}, to the last loop {to_last:.3f}")

# %% [markdown]
# **What it shows.** Attention changes less from loop to loop: 0.165 in loop 1, 0.0008 in loop 127. There is a norm before
# attention, so only the direction of the state counts, and directions change less and less. But small steps add up: patterns
# of loop 63 are still 0.07 away from those of loop 127.

# %% tags=["remove-cell"]
if TOY:
    patterns = found.pattern_successive.values.mean(1)
    assert 0.16 < patterns[0] < 0.17 and patterns[-1] < 0.00085 and (patterns.diff() < 0).float().mean() > 0.95
    assert 0.06 < found.pattern_distance.values[63].mean() < 0.075 and (cosine.diff() > 0).all()

# %% [markdown]
# ## What decides it: norms and injection (figures 6 and 29 to 31)
#
# The paper draws random weights for three kinds of norms, with and without injection, and looks which settle. A run at the
# paper's size (12 layers, 128 loops, 3 seeds; `tl-looped sweep-init`) takes three minutes. This is its table, copied from
# [Which looped layouts settle](../docs/random_init_sweep.md). Weights have a standard deviation of 0.02, the embedding of 1; X
# is the state after 64 loops, `X*` that after 128.
#
# | layout | distance to X* | cosine | norm at 64 | at 128 | degeneracy | verdict |
# |---|---|---|---|---|---|---|
# | pre-norm, injection | 1.58e-07 | 1 | 2.74 | 2.74 | 0.926 | fixed point, one per layer |
# | Huginn norm, injection | 1.11e-05 | 1 | 11.3 | 11.3 | 0.996 | fixed point, one per layer |
# | Ouro norm, injection | 1.26 | 0.198 | 38.8 | 39 | 0.275 | does not settle |
# | pre-norm, none | 0.565 | 0.965 | 107 | 231 | 1 | direction only, shared |
# | Huginn norm, none | 1.19 | 0.15 | 11.3 | 11.3 | 0.996 | does not settle |
# | Ouro norm, none | 1.39 | 0.0295 | 44.5 | 44.9 | 0.574 | does not settle |
#
# The verdicts look at the state after half of the loops:
#
# - **fixed point**: within 1 % of `X*`; **direction only**: not so, but the cosine with `X*` is above 0.9; else **does not
#   settle**.
# - **degeneracy**: the lowest cosine between the `X*` of layer 0 and that of another layer. Above 0.999 all layers **share**
#   one fixed point or direction (a degenerate one, in the paper's word), else there is **one per layer**.
#
# This is the paper's result: with injection, pre-norm and Huginn's norm reach a fixed point in every layer; without it, only
# pre-norm settles, and degenerately. It depends on the scale: with the embedding at 0.02, or weights at 1/sqrt(fan_in), no
# injected layout settles (same page).
#
# Now a small sweep that runs in seconds: 4 layers of width 64, 64 loops, one seed, the same standard deviations.

# %%
sweep = random_init_sweep(n_layers=4, d_model=64, n_loops=64, seeds=1, std=0.02, embed_std=1.0, verbose=False)
print(sweep.summary())

# %%
cosines = go.Figure(layout={"xaxis_title": "loop"})
distances = sweep.plot()
for row, line in zip(sweep.cosine.values.tolist(), distances.data, strict=True):
    cosines.add_scatter(y=row[:-1], name=line.name, line=line.line)
beside(relative_distance=distances, cosine=cosines)

# %% [markdown]
# **What it shows.** Four of six verdicts are those of the full run. Two are not, and both are near a threshold.
#
# - *pre-norm, none* "does not settle": its cosine is 0.87 after 32 of 64 loops. It rises with the loops; the full run has 0.965
#   after 64 of 128. What both see is a norm that grows and a degeneracy of 1.
# - *Huginn norm, injection* is "shared": its degeneracy is above 0.999; in the full run, with 12 layers, 0.996.
#
# So a small sweep can show what is far from every threshold: injection brings a fixed point to two norms and not to Ouro's. It
# cannot show that without injection *nothing* settles.
#
# `toy:text` is a *pre-norm, none* model, and behaves like that row: its norm doubles from loop 63 to 127, the cosine to `X*` in
# loop 63 is 0.91, and its degeneracy is 1.000. Exercise 3 asks what training has to do with it.

# %% tags=["remove-cell"]
assert sweep.verdicts == {
    "pre-norm, injection": "fixed point, one per layer",
    "Huginn norm, injection": "fixed point, shared",
    "Ouro norm, injection": "does not settle",
    "pre-norm, none": "does not settle",
    "Huginn norm, none": "does not settle",
    "Ouro norm, none": "does not settle",
}
at = sweep.cosine.labels["layout"].index("pre-norm, none")
assert 0.86 < sweep.cosine.values[at, 31] < 0.9 and (sweep.cosine.values[at].diff() > 0).all()
assert sweep.degeneracy.values[at] > 0.999 and sweep.norm.values[at, 63] > 1.5 * sweep.norm.values[at, 31]
assert sweep.degeneracy.values[1] > 0.999
if TOY:
    assert model.looped_cfg.norm == "pre" and model.looped_cfg.injection == "none"
    assert 0.9 < found.distance["cosine"].values[63].mean() < 0.92 and 2 < norm[127] / norm[63] < 2.2

# %% [markdown]
# ## Does each layer look where it looked before? (figures 2 and 21)
#
# The distance between the attention patterns of all pairs of executed layers. Diagonal bands at a distance of
# the length of the loop mean that a layer resembles itself in other loops more than it resembles other layers.

# %%
distances = attention_distances(model, few, verbose=False)  # the paper has n_loops=8 and 32
figure = distances.plot(title="Distance between attention patterns").update_xaxes(showticklabels=False)
figure.update_traces(hovertext=None, customdata=None, hovertemplate=None)

# %%
passes = schedule.passes_of("all")
same, other = [], []
for a in passes:
    for b in passes:
        if a.loop < b.loop:
            block = distances.values[a.first : a.layers.stop, b.first : b.layers.stop]
            diagonal = torch.eye(len(block), dtype=torch.bool)
            same.append(block[diagonal].mean())
            other.append(block[~diagonal].mean())
same_layer, other_layers = torch.stack(same).mean(), torch.stack(other).mean()
print(f"the same layer in another loop: {same_layer:.3f}; another layer in another loop: {other_layers:.3f}")

# %% [markdown]
# **What it shows.** Bands. From itself in another loop a layer is less than half as far as from another layer. Exercise 4
# asks about the paper's bound on such distances.

# %% tags=["remove-cell"]
if TOY:
    assert 0.3 < same_layer / other_layers < 0.5

# %% [markdown]
# ## The looped floorplan (figure 63)
#
# All attention patterns of one run, mean over heads: prelude in blue, one row per loop, coda in red. The first 6 tokens.

# %%
floorplan(looped_floorplan(model, tokens[0, :6]), schedule.sites, title="Attention, mean over heads").update_layout(height=460)

# %% [markdown]
# ## Stages of inference (figures 8 and 9)
#
# An ordinary model goes through stages from its first layer to its last, which show in a few numbers: how much of the
# attention goes to few tokens (`colsum`), how widely it is spread (`mixing`, in nats), the share of heads that are sinks, that
# is, give the first token at least 30 % of their attention (`sink_rate`), and the entropy and the norm of the residual stream.
# In a looped model each pass may go through the stages anew.

# %%
stages = inference_stages(model, tokens, verbose=False)
beside(mixing=stages.plot("mixing", "recurrence"), norm=stages.plot("norm", "recurrence"))

# %%
to_first = []
model.run_with_hooks(
    tokens,
    fwd_hooks=[
        (f"blocks.{i}.attn.hook_pattern", lambda x, hook: to_first.append(x[..., 0].float().mean((0, 2)).amax()))
        for i in range(schedule.n_layers)
    ],
)
print(f"sink rate, highest of all layers: {stages.sink_rate.values.max():.2f}")
print(f"highest share of attention that a head gives to the first token: {torch.stack(to_first).max():.2f}")

# %% [markdown]
# **What it shows.** From pass 1 on the curve of `mixing` moves up in every pass, and so does that of the norm. **No head of the
# toy is a sink**: the sink rate is 0 in every layer, and no head gives the first token more than 19 %. So of figure 9 only the
# norm is worth a plot.
#
# ### Does each pass repeat the one before?
#
# `repetition()` gives two scores. *Correlation* asks for the same form of the curve. *Concordance* asks for the same curve:
# form, level and scale. A score needs a control: the same structure before training, with six seeds.

# %%
METRICS = ("colsum", "mixing", "entropy", "norm")  # the order of `repetition` and `spread`
if TOY:
    before = [inference_stages(untrained(model, seed=s), tokens, verbose=False) for s in range(6)]
    again, again_before = repetition(stages), torch.stack([repetition(one)[0] for one in before])
    apart, apart_before = spread(stages), torch.stack([spread(one) for one in before])
    for k, name in enumerate(METRICS):
        print(f"{name}, passes 2 and 3")
        for s, score in enumerate(("correlation", "concordance")):
            ours, theirs = again[0, 1:, k, s], again_before[:, 1:, k, s]
            print(f"  {score:11} {ours[0]:5.2f} {ours[1]:5.2f}   untrained: {theirs.min():5.2f} to {theirs.max():5.2f}")
        theirs = apart_before[:, k]
        print(f"  layers differ by {apart[k]:.4f}   untrained: {theirs.min():.4f} to {theirs.max():.4f}")
    swapped = again[-1, 1:, :2, 0].mean(0)
    print(f"first and last layer of every second pass exchanged, correlation: {swapped[0]:.2f}, {swapped[1]:.2f}")
else:
    scores, figure = stages.repetition(), go.Figure(layout={"template": "plotly_white", "height": 320})
    for k, name in enumerate(scores.labels["metric"]):
        figure.add_scatter(x=[int(t) for t in scores.labels["loop"]], y=scores.values[:, k, 1].tolist(), name=name)
    figure.update_xaxes(title="pass").update_yaxes(title="concordance with the pass before").show()

# %% [markdown]
# **What it shows.** From the second pass on the form repeats almost perfectly in all four numbers. **That is no evidence of
# learning.** Passes share their weights, and untrained ones repeat, too: always in entropy and norm, and with some seeds in
# attention, in correlation and concordance alike. Untrained, the concordance of `colsum` goes from -0.11 to 0.97, so the
# trained 0.97 and 0.98 prove nothing.
#
# What does stand out is how far the **layers differ** in where they look: untrained by less than 0.003 in `colsum` and 0.006
# nats in `mixing`, trained by 0.024 and 0.58. The layers have taken roles. A second training seed agrees
# ([Stages on text](../docs/stages_on_text.md): 0.048 ± 0.022 and 0.43 ± 0.14 over two seeds). In entropy and norm they differ
# less than before training.
#
# Three layers give curves of three points, and these correlate easily. With its first and last layer exchanged in every second
# pass, this loop "repeats itself" with a correlation of 0.98 or more.

# %% tags=["remove-cell"]
if TOY:
    assert stages.sink_rate.values.max() == 0 and 0.18 < torch.stack(to_first).max() < 0.19
    assert (stages.curves("mixing").diff(dim=0)[1:] > 0).all() and (stages.curves("norm").diff(dim=0) > 0).all()
    assert again[0, 1:, :, 0].min() > 0.95 and again_before[:, 1:, 2:, 0].min() > 0.98
    assert again_before[:, 1:, :2, 0].max() > 0.99 and again_before[:, 1:, :2, 0].min() < 0
    assert 0.96 < again[0, 1:, 0, 1].min() and again[0, 1:, 0, 1].max() < 0.985
    control = again_before[:, 1:, :2, 1]  # concordance [seed, pass, metric]; as far apart as it can be
    assert abs(control[..., 0].min() + 0.11) < 0.02 and abs(control[..., 0].max() - 0.97) < 0.02
    assert control[..., 1].min() < 0 and control[..., 1].max() > again[0, 1:, 1, 1].max()
    assert apart_before[:, 0].max() < 0.003 and apart_before[:, 1].max() < 0.006 and 0.023 < apart[0] < 0.026
    assert 0.56 < apart[1] < 0.59 and (apart[2:] < apart_before[:, 2:].amin(0)).all() and swapped.min() > 0.975

# %% [markdown]
# ## Are they the stages of a feed-forward model? (figures 7 and 10)
#
# We lay every pass, with prelude and coda, over the curve of `toy:text-feedforward` (dotted), which has as many layers as
# `toy:text` executes and was trained on the same text. Then we correlate, on relative depth. As a control we pretend that the
# layers of each pass had run in one of the five other orders.

# %%
figure = stages.plot("colsum", "recurrence")
if TOY:
    feed_forward = inference_stages(LoopedBridge.from_pretrained("toy:text-feedforward"), tokens, verbose=False)
    curve = feed_forward.colsum.values
    x = torch.linspace(0, 100, len(curve)).tolist()
    figure.add_scatter(x=x, y=curve.tolist(), name="feed-forward", line={"color": "black", "dash": "dot"})
figure.update_layout(height=300)

# %%
if TOY:
    like = resemblance(stages, feed_forward)[..., 0]  # [order, loop, metric]; the first order is the true one
    for k, metric in enumerate(METRICS):
        print(f"{metric:8} passes 0 to 3:", *(f"{c:5.2f}" for c in like[0, :, k]), end="")
        print(f"   other orders, passes 1 to 3: {like[1:, 1:, k].mean():5.2f}")

# %% [markdown]
# **What it shows.**
#
# - `colsum`: passes 1 to 3 resemble the feed-forward curve in the true order of the layers (0.55 to 0.6), and not in the
#   others. This looks like the paper's finding. **It is not safe to say so.** Over two training seeds of each model the mean is
#   -0.12 ± 0.4 ([Stages on text](../docs/stages_on_text.md)). One lucky seed is how such a result comes about.
# - `mixing`: some resemblance, but the other orders resemble it as much. There is none in the order of the layers.
# - `entropy` and `norm`: high, and nearly as high in any order. These scores say little.
#
# The first pass is not like the others: its `colsum` does not correlate with that of the second.

# %% tags=["remove-cell"]
if TOY:
    assert 0.545 < like[0, 1:, 0].min() and like[0, 1:, 0].max() < 0.6 and like[1:, 1:, 0].mean() < 0
    assert abs(like[0, 1:, 1].mean() - like[1:, 1:, 1].mean()) < 0.05
    assert like[0, 1:, 2:].min() > 0.75 and (like[0, 1:, 2:].mean(0) - like[1:, 1:, 2:].mean((0, 1))).max() < 0.15
    assert like[0, 0, 0] < 0 and again[0, 0, 0, 0] < 0.2

# %% [markdown]
# ## Loops beyond training (section 5.2)
#
# The paper says that models with fixed points keep their stages however often they loop, and that Ouro drifts.

# %%
MORE = (4 if TOY else 2) * model.n_loops
beyond = more_loops(model, tokens, n_loops=MORE, verbose=False)
longer = inference_stages(model, tokens, n_loops=MORE, verbose=False)
beside(
    loss_by_number_of_loops=beyond.loss.plot(),
    mixing_by_loop=longer.plot("mixing", "layer"),
)

# %%
print("loss:", *(f"{n + 1}: {loss:.3f}" for n, loss in enumerate(beyond.loss.values.tolist())))
for metric in ("colsum", "mixing"):
    curves = longer.curves(metric)
    apart_at = (curves.amax(1) - curves.amin(1)).tolist()
    print(f"layers differ in {metric}, pass {model.n_loops - 1}: {apart_at[model.n_loops - 1]:.4f}", end="; ")
    print(f"pass {MORE - 1}: {apart_at[-1]:.4f}")
scores = longer.repetition()
last = dict(zip(scores.labels["metric"], scores.values[-1, :, 1].tolist(), strict=True))
print(f"concordance of mixing with the pass before, pass {MORE - 1}: {last['mixing']:.3f}")
if TOY:
    like_longer = resemblance(longer, feed_forward)[0, :, 0, 0]
    print(f"colsum against feed-forward, pass 3: {like_longer[3]:.2f}; pass {MORE - 1}: {like_longer[-1]:.2f}")

# %% [markdown]
# **What it shows.** The loss is lowest at the four loops of training (3.656; 3.683 at five), and 4.598 at 16. Stages drift: all
# layers spread their attention ever more widely, and differ less and less: in pass 15 by 0.006 in `colsum` and by 0.28 nats in
# `mixing`. The resemblance of `colsum` to the feed-forward curve is gone (0.00). Yet each pass still repeats the one before
# (concordance of `mixing` above 0.99): repetition is no sign of health.

# %% tags=["remove-cell"]
if TOY:
    loss_at = beyond.loss.values
    assert loss_at.argmin() == 3 and (loss_at[3:].diff() > 0).all()
    assert [round(loss_at[n - 1].item(), 3) for n in (4, 5, 16)] == [3.656, 3.683, 4.598]
    assert (longer.curves("mixing")[3:].diff(dim=0) > 0).all()
    for metric, least in (("colsum", 0.006), ("mixing", 0.28)):
        curves = longer.curves(metric)
        apart_at = curves.amax(1) - curves.amin(1)
        assert (apart_at[3:].diff() < 0).all() and abs(apart_at[-1] / least - 1) < 0.06
    assert last["mixing"] > 0.99 and like_longer[-1].abs() < 0.005

# %% [markdown]
# ## Do the stages depend on an early MLP? (figure 41)
#
# So far we only looked. The paper's intervention: zero the MLP of an early layer of the retrofitted Llama, and the massive
# activations vanish, and the stages with them. First, what each MLP of the loop is worth: the rise of the loss without it, in
# one loop.


# %%
def loss_with(hooks):
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:]).item()


intact = loss_with([])
loops = list(range(0, model.n_loops, -(-model.n_loops // 8)))  # eight of them at most
worth = torch.tensor([[loss_with(ablate(model, "mlp", loops=t, layers=j)) for t in loops] for j in range(n_core)]) - intact
labels = {"layer": [str(j) for j in range(n_core)], "loop": [str(t) for t in loops]}
Grid(worth, ("layer", "loop"), labels, "rise of the loss").plot(title="Loss without one MLP in one loop, less the loss with it")

# %% [markdown]
# Then the early layer: the last of the prelude, or the second of the first loop where there is no prelude.

# %%
if schedule.n_prelude:
    early = ablate(model, "mlp", stack="prelude", layers=-1)
else:
    early = ablate(model, "mlp", loops=0, layers=min(1, n_core - 1))
with model.hooks(fwd_hooks=early):
    without = inference_stages(model, tokens, verbose=False)
figure = stages.plot("colsum")
figure.data[0].update(name="intact", showlegend=True)
figure.add_scatter(y=without.colsum.values.tolist(), name="early MLP zeroed", mode="lines+markers")
figure.update_layout(height=300)


# %%
def first_over_others(hooks):
    """Norm of the first token over the mean norm of the others, highest of all layers."""
    found = []
    read = [
        (f"blocks.{i}.hook_resid_post", lambda x, hook: found.append(x.float().norm(dim=-1))) for i in range(schedule.n_layers)
    ]
    model.run_with_hooks(tokens, fwd_hooks=[*hooks, *read])
    norms = torch.stack(found)  # [layer, batch, pos]
    return (norms[:, :, 0] / norms[:, :, 1:].mean(-1)).mean(1).max()


ratio, ratio_without = first_over_others([]), first_over_others(early)
loss_without, in_every_loop = loss_with(early), loss_with(ablate(model, "mlp"))
print(f"loss {intact:.3f}; early MLP zeroed {loss_without:.2f}; all MLPs of all loops zeroed {in_every_loop:.2f}")
print(f"norm of the first token over that of the others, highest: {ratio:.1f}; early MLP zeroed {ratio_without:.1f}")
for metric in ("colsum", "mixing"):
    values = [curve.amax() - curve.amin() for curve in (stages.curves(metric)[-1], without.curves(metric)[-1])]
    print(f"layers of the last pass differ in {metric} by {values[0]:.3f}; early MLP zeroed {values[1]:.3f}")

# %% [markdown]
# **What it shows.** No MLP of the loop is needed in any single loop: the loss rises by less than 0.03. All of them in all loops
# are: it rises by 0.85. The MLP of the prelude is worth more than all of these: without it the loss is 7.67.
#
# There are no massive activations to lose: the first token's norm is at most 2.9 times that of the others. Without that MLP
# this falls to 1.5, attention is concentrated less, and the differences between layers become about half as large. They do not
# vanish. And a model with a loss of 7.67 is broken as a whole, so this is weak evidence for a cause.

# %% tags=["remove-cell"]
if TOY:
    assert 0 < worth.min() and worth.max() < 0.03 and 0.84 < in_every_loop - intact < 0.86 and 7.65 < loss_without < 7.69
    assert 2.8 < ratio < 2.95 and 1.45 < ratio_without < 1.56
    assert (without.curves("colsum") < stages.curves("colsum")).float().mean() > 0.9
    assert all(0.45 < x < 0.65 for x in (spread(without)[:2] / spread(stages)[:2]).tolist())

# %% [markdown]
# ## Figures of the paper
#
# | figure | here |
# |---|---|
# | 2, 21 | *Does each layer look where it looked before?* |
# | 3, 4 | *Does the state settle?* |
# | 5, 26 to 28 | *The path of one token* |
# | 6, 29 to 31 | *What decides it*: at 4 layers; the run at 12 as a table. 16 layers: `random_init_sweep(n_layers=16)` |
# | 8, 9 | *Stages of inference*; not drawn: `stages.plot("entropy")`, and the sink rate, which is 0 |
# | 7, 10, 11 | *Are they the stages of a feed-forward model?*; by layer: `longer.plot("colsum", "layer")` |
# | 22, 24 | *In which direction does it go?* |
# | 23, 25 | *Does attention settle?* |
# | 41 | *Do the stages depend on an early MLP?* |
# | 63 | *The looped floorplan* |
# | section 5.2 | *Loops beyond training* |
# | appendix C, 14 to 18 | *Where does each token end?*; 14 is `ending.co_occurrence`; 15 to 18 need orbits, the toy has none |
# | proposition 4.2 | not reproduced here, because it does not hold literally for rotary positions; see exercise 4 |
# | prediction and suppression neurons | not reproduced here, because the toy has none (exercise 5) |
# | 19 | not reproduced here: cosines between all pairs of states; `found.layer_cosine` has those of the `X*` |
# | 12, 36, 40; all of Ouro, Huginn, retrofits | not reproduced here, because they need published weights: set `MODEL` |
# | all on GSM8K and HellaSwag | not reproduced here, because the toy only knows the documentation of Python |
#
# ## What this does not show
#
# - That language models of this kind behave so. `toy:text` has 271 thousand parameters and three looped layers; this is one
#   training seed. [Stages on text](../docs/stages_on_text.md) has a second one, all held-out windows and standard errors.
# - That there is a fixed point where a curve falls: every distance to the last state ends at 0.
# - That stages of a feed-forward model arise in the loop. The evidence is three points per pass.
# - That the stages *do* anything. Zeroing an early MLP breaks the model as a whole. For finer interventions see the
#   [second tutorial](02_activation_patching_across_loops.ipynb).
#
# ## Exercises
#
# **1.** Does a model with injection settle? Look at `"toy:hop"`, which chases pointers:
# `fixed_points(hop, hop_prompts(16).tokens, n_loops=64)`.
#
# <details><summary>Answer</summary>
#
# No, and it should not. It answers with another symbol after each loop, and goes on doing so: the relative step stays above
# 0.3. The norm stays bounded. The [sixth tutorial](06_train_your_own.ipynb) trains such a model and shows the orbit. So
# injection allows a fixed point; it does not enforce one.
#
# </details>
#
# **2.** Take the whole run as one pass through the stages: is its curve like the feed-forward model's?
# `tl_looped.analysis.stage_order.as_one_pass(stages).compare(feed_forward)`.
#
# <details><summary>Answer</summary>
#
# Not in attention: the correlation is about -0.4 for `colsum` and 0.1 for `mixing`. For `entropy` and `norm` it is above 0.9.
# Over two seeds of each model it is 0.08 ± 0.20 for `colsum` ([Stages on text](../docs/stages_on_text.md)). A score of one
# model against one model is one number.
#
# </details>
#
# **3.** Is it training that makes the norm grow? `fixed_points(untrained(model, 0), few, n_loops=64)`.
#
# <details><summary>Answer</summary>
#
# No. Before training the norm is 194 in loop 63, that is more than the 104 of the trained model; the steps are longer (3.2
# against 2.0). All layers share a direction (degeneracy 1.000), as in the row *pre-norm, none* of the table.
#
# </details>
#
# **4.** Proposition 4.2 of the paper bounds how far attention can move when the state does: `|A - A'| <= B kappa / sqrt(d_head)
# |X - X'|` in the Frobenius norm, with what attention reads (`attn.hook_in`) as X, the larger spectral norm of X and X' as B
# and that of `W_Q W_K^T` as kappa. It does not know rotary positions. How much of the bound is used without them, by
# `LoopedBridge.from_config(model.looped_cfg.replace(rope_layout="none"), seed=0)`?
#
# <details><summary>Answer</summary>
#
# At most 0.2 %, from any loop to the next, in any head. So the bound holds, and says little.
#
# </details>
#
# **5.** Are there neurons at the end that raise or lower few tokens? `output_neurons(model)`.
#
# <details><summary>Answer</summary>
#
# None, in any layer: no neuron's effect on the logits has an excess kurtosis above 10.
#
# </details>

# %% tags=["remove-cell"]
if TOY:
    from tl_looped.analysis import output_neurons
    from tl_looped.analysis.stage_order import as_one_pass
    from tl_looped.toys import hop_prompts

    hop = fixed_points(LoopedBridge.from_pretrained("toy:hop"), hop_prompts(16).tokens, n_loops=64, verbose=False)
    assert hop.successive["relative"].values.min() > 0.3 and hop.norm.values[15:].max() < 1.3 * hop.norm.values[15:].min()
    one = as_one_pass(stages).compare(feed_forward)
    score = dict(zip(one.labels["metric"], one.values[0, :, 0].tolist(), strict=True))
    assert -0.5 < score["colsum"] < -0.25 and -0.05 < score["mixing"] < 0.25 and min(score["entropy"], score["norm"]) > 0.9
    start = fixed_points(untrained(model, 0), few, n_loops=64, verbose=False)
    assert abs(start.norm.values[63].mean() - 194) < 1 and start.degeneracy.values[0] > 0.9995
    assert abs(start.successive["l2"].values[62].mean() - 3.2) < 0.05 and abs(l2[62] - 2) < 0.05
    plain = LoopedBridge.from_config(model.looped_cfg.replace(rope_layout="none"), seed=0)
    core = plain.schedule.passes[0].layers
    with torch.no_grad():
        _, cache = plain.run_with_cache(few)
    read, patterns = (cache.stack_loops(name).double() for name in ("attn.hook_in", "pattern"))
    size, attns = torch.linalg.matrix_norm(read, ord=2), [plain.blocks[i].attn for i in core]
    kappa = torch.stack([torch.linalg.matrix_norm(attn.W_Q.double() @ attn.W_K.double().mT, ord=2) for attn in attns])
    bound = size[1:].maximum(size[:-1]) * read.diff(dim=0).flatten(-2).norm(dim=-1) / model.looped_cfg.d_head**0.5
    used = patterns.diff(dim=0).flatten(-2).norm(dim=-1) / (bound[..., None] * kappa[:, None])  # [loop, layer, prompt, head]
    assert 0 < used.max() < 0.002
    assert output_neurons(model).values.max() == 0
    assert sum(p.numel() for p in set(model.original_model.parameters())) // 1000 == 271
