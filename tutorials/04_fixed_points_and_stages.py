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
# [colab]: https://colab.research.google.com/github/tl-looped/tl_looped/blob/main/tutorials/04_fixed_points_and_stages.ipynb
#
# # Fixed points and stages of inference
#
# **Question.** A looped model runs the same layers again and again. Does its state settle? And does every pass do the same
# work, as an ordinary model does once from its first layer to its last?
#
# "A Mechanistic Analysis of Looped Reasoning Language Models" (arXiv 2604.11791) asks this of Ouro, Huginn and retrofitted
# models. We follow its figures on a small language model that comes with the package. The paper's answers need not hold for
# it; that is what we look at.

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

from tl_looped import LoopedBridge
from tl_looped.analysis import attention_distances, fixed_points, inference_stages, random_init_sweep
from tl_looped.toys.stages import held_out_windows, repetition, resemblance, spread, untrained

MODEL = "toy:text"  # on a GPU, for example "ByteDance/Ouro-1.4B"
TOY = MODEL == "toy:text"  # what is said about numbers is true of this model only
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
pio.renderers.default = "plotly_mimetype+notebook_connected"

# %% [markdown]
# `toy:text` was trained on the documentation of Python: one layer of prelude, three looped layers, four loops, one layer of
# coda, no injection, and a loss on the last output only. We use text that was held out.

# %%
model = LoopedBridge.from_pretrained(MODEL)
if TOY:
    tokens = held_out_windows(model, 8)
else:
    tokens = model.to_tokens("The square root of 16 is")
print(model.schedule)
print("prompts and positions:", tuple(tokens.shape))
print(model.to_string(tokens[0, 1:40]))

# %% [markdown]
# ## Does the state settle? (figures 3 and 4)
#
# `X[t, l]` is the residual stream leaving layer `l` in loop `t`. Figure 3 is the distance to the loop before. Figure 4 is the
# distance to `X*`, the state of a last loop far away. We run 64 loops; the model was trained for four.

# %%
found = fixed_points(model, tokens[:8], n_loops=64, verbose=False)
found.plot("successive", "relative")

# %%
found.plot("norm")

# %%
for loop in (1, 3, 7, 15, 31, 63):
    change = found.successive["relative"].values[loop - 1].mean()
    absolute = found.successive["l2"].values[loop - 1].mean()
    cosine = found.successive["cosine"].values[loop - 1].mean()
    norm = found.norm.values[loop].mean()
    print(f"loop {loop:2}: change {absolute:5.2f}, relative {change:.3f}, cosine {cosine:.4f}; norm {norm:6.1f}")

# %% [markdown]
# The relative change falls from loop to loop, which looks like convergence. It is not. The change itself stays near 1.9, and
# the norm grows by about as much in every loop: the state walks on in one direction. A growing norm makes every step look
# smaller. So look at a norm beside every relative distance, and beside every cosine.
#
# The paper finds fixed points in the models that inject the prompt in every loop, and none in Ouro, which does not inject.
# `toy:text` does not inject either.

# %% tags=["remove-cell"]
if TOY:
    l2, relative, norm = (
        found.successive["l2"].values.mean(1),
        found.successive["relative"].values.mean(1),
        found.norm.values.mean(1),
    )
    assert (relative.diff() < 0).all() and relative[-1] < 0.03
    assert 1.7 < l2[10:].min() and l2[10:].max() < 2.1  # l2[t - 1] is the change in loop t
    assert (
        (norm.diff() > 0).all() and 1.3 < norm[15:].diff().mean() < 1.8 and found.successive["cosine"].values[-1].min() > 0.999
    )

# %% [markdown]
# ## What decides it: norms and injection (figure 6)
#
# The paper draws random weights for three kinds of norms, with and without injection, and looks which settle. Here is a small
# version: 4 layers, 64 loops, one seed. `tl-looped sweep-init` runs the paper's size in three minutes; the tables are in
# [Which looped layouts settle](../docs/random_init_sweep.md).

# %%
sweep = random_init_sweep(n_layers=4, d_model=64, n_loops=64, seeds=1, verbose=False)
for layout, verdict in sweep.verdicts.items():
    print(f"{layout:24}{verdict}")

# %%
sweep.plot()

# %% [markdown]
# In both families of norms that reach a fixed point it is the injection that brings it about: without it, neither does. Even
# at this size the norms decide too: with Ouro's, the state does not settle, injection or not.

# %% tags=["remove-cell"]
settled = [layout for layout, verdict in sweep.verdicts.items() if verdict.startswith("fixed point")]
assert settled == ["pre-norm, injection", "Huginn norm, injection"]

# %% [markdown]
# ## Does each layer look where it looked before? (figure 2)
#
# The distance between the attention patterns of all pairs of executed layers. Diagonal bands at a distance of three layers,
# the length of the loop, mean that a layer resembles itself in other loops more than it resembles other layers.

# %%
distances = attention_distances(model, tokens[:8], verbose=False)
distances.plot("Distance between attention patterns")

# %%
schedule = model.schedule
passes = schedule.passes_of("all", schedule.looped_stack(None))
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

# %% tags=["remove-cell"]
if TOY:
    assert 0.3 < same_layer / other_layers < 0.45

# %% [markdown]
# ## Stages of inference (figures 7, 8 and 10)
#
# An ordinary model goes through stages from its first layer to its last, which show in a few numbers: how much of the
# attention goes to few tokens (`colsum`), how widely it is spread (`mixing`, in nats), the entropy and the norm of the
# residual stream. In a looped model each pass may go through the stages anew.

# %%
stages = inference_stages(model, tokens, verbose=False)
stages.plot("mixing", "recurrence")

# %%
stages.plot("colsum", "recurrence")

# %% [markdown]
# Is each pass a repetition of the one before? `repetition()` says so with two scores. *Correlation* asks for the same form of
# the curve. *Concordance* asks for the same curve: form, level and scale.
#
# A score needs a control. We take two: the same structure before training, and the feed-forward model `toy:text-feedforward`
# with as many layers as `toy:text` executes, trained on the same text.

# %%
if TOY:
    METRICS = ("colsum", "mixing", "entropy", "norm")
    before = inference_stages(untrained(model, seed=0), tokens, verbose=False)
    feed_forward = inference_stages(LoopedBridge.from_pretrained("toy:text-feedforward"), tokens, verbose=False)
    for name, one in {"trained": stages, "before training": before}.items():
        again, apart = repetition(one)[0], spread(one)  # [loop, metric, score]; passes 1 to 3
        print(name)
        for k, metric in enumerate(METRICS):
            print(f"  {metric:8} correlation", *(f"{c:5.2f}" for c in again[:, k, 0]), end="")
            print("   concordance", *(f"{c:5.2f}" for c in again[:, k, 1]), f"  layers differ by {apart[k]:.4f}")
else:
    print(stages.repetition().to_dataframe())

# %% [markdown]
# From the second pass on the form repeats almost perfectly, in all four numbers. But so it does **before training**, in
# `colsum`, `entropy` and `norm`: the passes share their weights, so they must resemble each other. That the form repeats shows
# nothing about learning. Two things do:
#
# - Before training the layers do not differ in where they look: the values of a pass are within 0.002 of each other. After
#   training they differ by 0.02 in `colsum` and by more than 0.5 nats in `mixing`. Layers have taken roles, and that holds for
#   the other seed, too.
# - These roles keep their level from pass to pass (concordance above 0.75), while entropy and norm drift: their curves are
#   moved upwards in every pass (concordance below 0.2).

# %% tags=["remove-cell"]
if TOY:
    again, again_before = repetition(stages)[0], repetition(before)[0]
    assert again[1:, :, 0].min() > 0.95 and again_before[1:, [0, 2, 3], 0].min() > 0.9
    assert spread(before)[:2].max() < 0.0025 and spread(stages)[0] > 0.02 and spread(stages)[1] > 0.5
    assert again[1:, :2, 1].min() > 0.75 and again[:, 2:, 1].max() < 0.2

# %% [markdown]
# ## Are they the stages of a feed-forward model?
#
# We lay every pass, with prelude and coda, over the curve of the feed-forward model, on relative depth, and correlate. As a
# control we pretend that the layers of each pass had run in one of the five other orders.

# %%
figure = go.Figure(layout={"template": "plotly_white", "title": "Concentration of attention (colsum)"})
lines = {f"pass {loop}": curve for loop, curve in enumerate(stages.curves("colsum", edges=True))}
if TOY:
    lines["feed-forward"] = feed_forward.colsum.values
for name, curve in lines.items():
    figure.add_scatter(x=torch.linspace(0, 100, len(curve)).tolist(), y=curve.tolist(), name=name, mode="lines+markers")
figure.update_xaxes(title="relative depth (%)").update_yaxes(title="colsum")

# %%
if TOY:
    like = resemblance(stages, feed_forward)[..., 0]  # [order, loop, metric]; the first order is the true one
    for k, metric in enumerate(METRICS):
        print(f"{metric:8} passes 0 to 3:", *(f"{c:5.2f}" for c in like[0, :, k]), end="")
        print(f"   other orders, passes 1 to 3: {like[1:, 1:, k].mean():5.2f}")

# %% [markdown]
# - `colsum`: passes 1 to 3 resemble the feed-forward curve in the true order of the layers (0.55 to 0.6), and not in the
#   others. This looks like the paper's finding. **It is not safe to say so.** A second model, trained in the same way from
#   another seed, has a correlation near -0.15 ([Stages on text](../docs/stages_on_text.md)). One lucky seed is how such a
#   result comes about.
# - `mixing`: some resemblance, but the other orders resemble it as much. There is none in the order of the layers.
# - `entropy` and `norm`: high, and nearly as high in any order, because the ends of the curve decide. These scores say little.
#
# The first pass is not like the others: it has to make of the prelude's output what the later passes work on.

# %% tags=["remove-cell"]
if TOY:
    assert 0.5 < like[0, 1:, 0].min() and like[0, 1:, 0].max() < 0.65 and like[1:, 1:, 0].mean() < 0
    assert abs(like[0, 1:, 1].mean() - like[1:, 1:, 1].mean()) < 0.05
    assert like[0, 1:, 2:].min() > 0.75 and (like[0, 1:, 2:].mean(0) - like[1:, 1:, 2:].mean((0, 1))).max() < 0.15
    assert like[0, 0, 0] < 0 and again[0, 0, 0] < 0.2

# %% [markdown]
# ## What this shows, and what it does not
#
# - `toy:text` does not settle. Its state grows without end, its loss is lowest at the four loops of its training, and rises
#   beyond.
# - Its layers have roles in attention that no loss asked for, and every pass after the first repeats them.
# - A loop of three layers gives curves of three points, and three points correlate easily: with its first and last layer
#   exchanged, this loop repeats itself as well. So the evidence for stages is weak, and that they are those of a feed-forward
#   model is not shown. [Stages on text](../docs/stages_on_text.md) has a second seed of each model, all held-out windows and
#   standard errors.
# - Nothing here says that the stages *do* anything. For that, intervene: see the second tutorial.
#
# ## Exercises
#
# 1. Does a model with injection settle? Look at `"toy:hop"`, which chases pointers: `fixed_points(hop, hop_prompts(16).tokens,
#    n_loops=64)`.
#
# <details><summary>Answer</summary>
# No, and it should not. It answers with another symbol after each loop, and goes on doing so. The norm stays bounded, but the
# state at a query goes round with the period of the mapping. Tutorial 6 trains such a model and shows the orbit. So injection
# allows a fixed point; it does not enforce one.
# </details>
#
# 2. Take the whole run as one pass through the stages: is its curve like the feed-forward model's?
#    `tl_looped.toys.stages.as_one_pass(stages).compare(feed_forward)`.
#
# <details><summary>Answer</summary>
# Not in attention: the correlation is about -0.4 for `colsum` and 0.1 for `mixing`. For `entropy` and `norm`, which mostly
# grow, it is above 0.9. With the other seed the sign for `colsum` changes, as it does for the single passes. A score of one
# model against one model is one number.
# </details>
#
# 3. What happens to the stages at 16 loops? `inference_stages(model, tokens, n_loops=16)`.
#
# <details><summary>Answer</summary>
# Successive passes still repeat each other, even better (concordance of `mixing` 1.00). But they drift away together: in the
# last pass `colsum` does not correlate with the feed-forward curve any more. That fits a state that never settles.
# </details>

# %% tags=["remove-cell"]
if TOY:
    from tl_looped.toys import hop_prompts
    from tl_looped.toys.stages import as_one_pass

    one = as_one_pass(stages).compare(feed_forward)
    score = dict(zip(one.labels["metric"], one.values[0, :, 0].tolist(), strict=True))
    assert -0.5 < score["colsum"] < -0.25 and -0.05 < score["mixing"] < 0.25 and min(score["entropy"], score["norm"]) > 0.9
    deep = inference_stages(model, tokens, n_loops=16, verbose=False)
    assert repetition(deep)[0, -1, 1, 1] > 0.98 and resemblance(deep, feed_forward)[0, -1, 0, 0].abs() < 0.2
    hop = fixed_points(LoopedBridge.from_pretrained("toy:hop"), hop_prompts(16).tokens, n_loops=64, verbose=False)
    assert hop.successive["relative"].values[-1].min() > 0.3 and hop.norm.values[15:].max() < 1.3 * hop.norm.values[15:].min()
