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
# [colab]: https://colab.research.google.com/github/tl-looped/tl_looped/blob/main/tutorials/06_train_your_own.ipynb
#
# # Train your own looped model
#
# **Question.** A looped model is trained on its answers only. When it has learnt to answer, what does its state do from loop
# to loop: does it settle, does it drift, or does it go round?
#
# **Experiment.** We train a model with two looped layers on a task whose right behaviour we know. Every 50 steps we measure its
# answers, its states and the roles of its layers. In the end we put a model beside it that was trained for longer. It takes
# about a minute on a CPU.
#
# *Outputs and numbers: `python tutorials/build.py 06_train_your_own`, two cores of a server, November 2026.*

# %%
try:
    import google.colab  # noqa: F401

    # %pip install -q 'tl-looped[viz]'
except ImportError:
    pass

# %%
import math

import plotly.graph_objects as go
import plotly.io as pio
import torch
from torch.nn.functional import cross_entropy

from tl_looped import LoopedBridge, LoopedConfig
from tl_looped.analysis import inference_stages
from tl_looped.model import LoopedModel
from tl_looped.model.looped_model import initialise
from tl_looped.toys.hop import WORDS, hop_accuracy, hop_prompts, hop_tokenizer

MODEL = "toy:hop"  # looked at in the end, beside the model that we train; for example "ByteDance/Ouro-1.4B"
torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
pio.renderers.default = "plotly_mimetype+notebook_connected"

# %% [markdown]
# ## The task: one lookup per loop
#
# A prompt lists a mapping as pairs of a key (capital letter) and a value (small letter), and then asks for every key. After
# the first loop the model has to answer with the value; after the second with the value of that value; and so on.

# %%
N_SYMBOLS, N_LOOPS = 4, 4
example = hop_prompts(1, N_SYMBOLS, seed=2)
print(example.texts[0])
for loop, answers in enumerate(example.answers(N_LOOPS)[:, 0]):
    print(f"answers after loop {loop}:", *(WORDS[token] for token in answers))

# %% [markdown]
# All mappings here are cycles through four symbols. So the fourth lookup leads back to the query, and the fifth answer is the
# first one again. A model that goes on with its task beyond four loops must therefore **not** settle at the queries: its
# answers repeat every four loops.
#
# ## The model and its training
#
# `LoopedModel` is the plain PyTorch model inside every `LoopedBridge`. Gradients flow through every pass, so an ordinary
# training loop trains it. `LoopedBridge(net)` puts the hooks around it, and shares its parameters: what we train is what we
# look at. Two things matter here:
#
# - Matrices begin with standard deviation 0.1. The default of 0.02 is small for 64 dimensions.
# - `on_loop=` is called with what the model would answer after each loop, and `loop=` says after which loop to stop. The loss
#   is the mean over the loops that run. They are added one by one: the next loop is trained as soon as the loss of the newest
#   is below 0.5.

# %%
config = LoopedConfig(
    d_model=64, n_heads=4, d_mlp=128, d_vocab=len(WORDS), n_ctx=32,
    n_prelude=1, n_core=2, n_loops=N_LOOPS, injection="concat", rope_theta=100.0,
)  # fmt: skip
net = initialise(LoopedModel(config), seed=0, std=0.1)
model = LoopedBridge(net, hop_tokenizer())
parameters = list(net.canonical_parameters().values())
print(model.n_loops, "loops,", model.cfg.n_layers, "virtual layers,", sum(p.numel() for p in parameters), "parameters")

# %%
N_STEPS, LEARNING_RATE = 500, 4e-3
optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
generator = torch.Generator().manual_seed(0)
test = hop_prompts(200, N_SYMBOLS, seed=99)


def train_step(step: int, n_active: int) -> int:
    """One step on the first `n_active` loops; returns how many the next one has."""
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * min((step + 1) / 50, (1 + math.cos(math.pi * step / N_STEPS)) / 2)
    prompts = hop_prompts(32, N_SYMBOLS, kind="cycle" if step % 2 else "function", seed=generator)
    answers, losses = prompts.answers(n_active), []

    def on_loop(loop, logits):
        losses.append(cross_entropy(logits[:, prompts.query_pos].flatten(0, 1), answers[loop].flatten()))

    net(prompts.tokens, loop=n_active - 1, on_loop=on_loop)
    optimizer.zero_grad()
    torch.stack(losses).mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return min(n_active + (losses[-1].item() < 0.5), N_LOOPS)


# %% [markdown]
# ## What we look at while it trains
#
# 1. **Accuracy** after each of 12 loops; the model is trained for at most four. `unroll(12)` is another view of the same
#    parameters.
# 2. **Does the state come back?** We take the state leaving loop 23, and compare it with the state 1, 2, ... 8 loops earlier:
#    `|X[23] - X[23 - lag]| / |X[23]|`. A model that settles gives 0 at every lag. A model that goes round with period four
#    gives 0 at lags 4 and 8 only. Two unrelated states of equal norm give $\sqrt 2$, about 1.41.
# 3. **Stages**: does each of the two looped layers have a role of its own, and does it repeat that role in every loop?
#    `mixing` is the mean entropy of attention in nats: low means that a layer looks at one place.


# %%
@torch.no_grad()
def come_back(model, tokens, positions, n_loops=24, max_lag=8):
    """Relative distance of the state leaving the last loop to the state some loops earlier, [lag]; mean over positions."""
    deep = model.unroll(n_loops)
    _, cache = deep.run_with_cache(tokens, names_filter="loops.*.hook_out")
    states = [cache[f"loops.{t}.hook_out"][:, positions].float() for t in range(n_loops)]
    last = states[-1]
    return torch.stack([((last - states[-1 - lag]).norm(dim=-1) / last.norm(dim=-1)).mean() for lag in range(1, max_lag + 1)])


history = []
n_active = 1
for step in range(N_STEPS + 1):
    if step % 50 == 0:
        with torch.no_grad():
            accuracy = hop_accuracy(model.unroll(12), test)
        stages = inference_stages(model, test.tokens[:64], verbose=False)
        history.append(
            {
                "step": step,
                "loops with a loss": n_active,
                "accuracy": accuracy,
                "queries": come_back(model, test.tokens[:64], test.query_pos),
                "mixing": stages.curves("mixing"),  # [loop, layer]
                "colsum": stages.curves("colsum"),
            }
        )
        print(f"step {step:3}  loops with a loss: {n_active}  accuracy:", " ".join(f"{a:.2f}" for a in accuracy[:6]))
    n_active = train_step(step, n_active)

# %% [markdown]
# ## Answers: lookups come one after the other

# %%
figure = go.Figure(layout={"template": "plotly_white", "xaxis_title": "training step"})
steps = [at["step"] for at in history]
for loop in (0, 1, 2, 3, 5, 7, 11):
    trained = "" if loop < N_LOOPS else " (not trained)"
    figure.add_scatter(x=steps, y=[float(at["accuracy"][loop]) for at in history], name=f"after loop {loop}{trained}")
figure.update_yaxes(title="accuracy")

# %% [markdown]
# **What it shows.** The first lookup takes longest: for 150 to 200 steps the model learns to attend from a query to the right
# pair. The other three, the same lookup by the same weights, follow within 50 steps. At the end the model is right in more
# than 99 % of the cases after each of its four trained loops, and in about 90 % or more after eight, for which it was never
# trained.
#
# Rounding differs between processors, and 500 steps amplify it: your curves will differ from these as those of another seed do.
# So every range in this notebook is that of ten runs: seeds 0 to 7, and seed 0 with two other sets of vector instructions.

# %% tags=["remove-cell"]
final = history[-1]
first = next(at["step"] for at in history if at["accuracy"][0] > 0.8)
fourth = next(at["step"] for at in history if at["accuracy"][3] > 0.8)
# Of ten runs (seeds 0 to 7; seed 0 with AVX2 and without vector instructions): 1.00, 0.89 to 0.98, 150 to 200, 50.
assert final["accuracy"][:4].min() > 0.99 and final["accuracy"][7] > 0.8
assert 100 <= first <= 300 and fourth - first <= 100

# %% [markdown]
# ## The state does not settle: it goes round

# %%
figure = go.Figure(layout={"template": "plotly_white", "title": "States at the queries"})
for at in history:
    if at["step"] in (0, 100, 200, 300, N_STEPS):
        figure.add_scatter(x=list(range(1, 9)), y=at["queries"].tolist(), name=f"step {at['step']}", mode="lines+markers")
figure.update_xaxes(title="lag (loops)").update_yaxes(title="|X[23] - X[23 - lag]| / |X[23]|", rangemode="tozero")

# %% tags=["remove-cell"]
start, end = history[0]["queries"], final["queries"]
others = torch.cat((end[:3], end[4:7]))
# Of ten runs: 0.10 to 0.60 of the mean at lag 4, 0.18 to 0.85 at lag 8; the accuracy falls by 0.03 to 0.21.
assert end[3] < 0.8 * others.mean() and end[7] < others.mean()
assert final["accuracy"][8:].max() < final["accuracy"][:4].min()
assert start.std() < 0.3 * start.mean()  # not trained: the same everywhere

# %% [markdown]
# **What it shows.** Before training all lags look much alike. After training the state comes closer to where it was four and
# eight loops before than to the states between: at lag 4 the distance is 0.1 to 0.6 of the mean over lags 1, 2, 3, 5, 6 and 7
# (ten runs). So this model has no fixed point at a query. It has an *orbit*, whose period is that of the mapping. The paper on
# cyclic fixed points (arXiv 2604.11791, appendix C) sorts tokens into such kinds; `tl_looped.analysis.limiting_behaviour` does
# it for any model.
#
# The distance at lag 4 is not 0 but 0.1 to 0.4: after this short training the orbit is only approximate. The accuracy falls as
# loops are added, too. Whether the one is the cause of the other is not tested here.
#
# ## Each layer takes a role, and repeats it in every loop

# %%
figure = go.Figure(layout={"template": "plotly_white", "title": "Where the two looped layers look"})
for layer, colour in enumerate(("#2166ac", "#d95f0e")):
    for loop in range(N_LOOPS):
        figure.add_scatter(
            x=steps, y=[float(at["mixing"][loop, layer]) for at in history], name=f"layer {layer}, loop {loop}",
            line={"color": colour, "dash": ("solid", "dash", "dashdot", "dot")[loop]},
        )  # fmt: skip
figure.update_xaxes(title="training step").update_yaxes(title="entropy of attention (nats)", rangemode="tozero")

# %% [markdown]
# **What it shows.** At first the layers do not differ. From step 250 on, layer 0 looks at few places and layer 1 at many, in
# every loop. At step 500 the entropies of layer 0 are 0.4 to 0.7 nats, and those of layer 1 are 1.0 to 1.5 (ten runs). The
# loss names no layer and no role. But mind two things. The weights are the same in every loop, so that a role which the weights
# cause must come back in every loop as long as the states are alike. And at step 150, when the loss has reached two loops at
# most, layer 0 has its role in loop 0 only.

# %% tags=["remove-cell"]
middle = history[3]["mixing"]
gaps = torch.stack([at["mixing"][:, 1] - at["mixing"][:, 0] for at in history])  # [step, loop]
assert gaps[0].abs().max() < 0.05  # not trained: the same everywhere
# Of ten runs: layer 1 is above layer 0 by 0.33 or more from step 250 on and by 0.49 or more in the end, in every loop; at step
# 150 layer 0 is lower in loop 0 than in the others by 0.40 to 0.70.
assert history[5]["step"] == 250 and gaps[5:].min() > 0.15 and gaps[-1].min() > 0.3
assert history[3]["step"] == 150 and middle[1:, 0].min() - middle[0, 0] > 0.2

# %% [markdown]
# ## Beside a model that was trained for longer
#
# `MODEL` is the bundled toy: six loops, eight symbols, 1,000 steps. Change it to another looped model, and the same code looks
# at the last token of a text.

# %%
other = LoopedBridge.from_pretrained(MODEL, device="cpu" if MODEL.startswith("toy:") else None)  # else a GPU, if there is one
if MODEL.startswith("toy:hop"):
    prompts = hop_prompts(64, N_SYMBOLS, seed=97)
    tokens, positions = prompts.tokens, prompts.query_pos
else:
    tokens, positions = other.to_tokens("The square root of 16 is"), slice(-1, None)
lags = come_back(other, tokens.to(other.cfg.device), positions).cpu()
figure = go.Figure(layout={"template": "plotly_white", "title": MODEL})
figure.add_scatter(x=list(range(1, 9)), y=lags.tolist(), mode="lines+markers")
figure.update_xaxes(title="lag (loops)").update_yaxes(title="|X[23] - X[23 - lag]| / |X[23]|", rangemode="tozero")

# %% tags=["remove-cell"]
if MODEL == "toy:hop":
    assert lags[3] < 0.05 and lags[7] < 0.05 and torch.cat((lags[:3], lags[4:7])).min() > 1.4

# %% [markdown]
# **What it shows.** The bundled toy returns to within 5 % of where it was four loops before. Between these visits it is as far
# away as unrelated states are ($\sqrt 2$ for states of equal norm).
#
# So a state may settle at one position and not at another (exercise 2). Where the answers must go on moving, a model that does
# not settle is right not to.
#
# ## What this does not show
#
# - Why the layers take these roles and not each other's. No loss asked for them, yet layer 0 looked at few places and layer 1
#   at many in all of ten runs.
# - Why the accuracy falls beyond eight loops. The inexact orbit is one candidate.
# - What the states of a language model do. The loss here is on every loop, and one such as Ouro is trained differently. Set
#   `MODEL`, and look.
#
# ## Exercises
#
# **1.** Train without injection (`injection="none"`). Is the state at the queries still an orbit after 24 loops?
#
# <details><summary>Answer</summary>
#
# Set it in `config` and run all cells; the asserted claims may fail then. For the bundled pair it is measured:
# `"toy:hop-noinject"` is as good as `"toy:hop"` in its six trained loops, and right in about one answer of ten from loop 12 on,
# at or below chance. Its state drifts: the distance grows with every lag and has no dip. Try `MODEL = "toy:hop-noinject"`.
#
# </details>
#
# **2.** Look at the pairs instead of the queries: `come_back(model, test.tokens[:64], slice(1, 2 * N_SYMBOLS + 1))`. What do
# you expect?
#
# <details><summary>Answer</summary>
#
# Nothing has to move there: a pair is read, and stays. The distance is small at every lag (at most 0.2 to 0.4 of what it is at
# the queries), without a clear period. Of the same model, some positions nearly settle and others go round. That is why one
# number for a whole prompt can mislead.
#
# </details>
#
# **3.** What is the dip for cycles of three symbols? And of two?
#
# <details><summary>Answer</summary>
#
# `three = hop_prompts(64, 3, seed=97)` and `come_back(model, three.tokens, three.query_pos)`. Although it was trained on four
# symbols only, the dips are at lags 3 and 6, and for two symbols at 2, 4, 6 and 8. The period belongs to the prompt, not to
# the weights.
#
# </details>

# %% tags=["remove-cell"]
bare = LoopedBridge.from_pretrained("toy:hop-noinject", device="cpu")
cycles = hop_prompts(64, N_SYMBOLS, seed=97)
assert come_back(bare, cycles.tokens, cycles.query_pos).diff().min() > 0.03
accuracy = hop_accuracy(bare.unroll(16), hop_prompts(400, seed=97))
assert accuracy[:6].min() > 0.99 and accuracy[12:].max() < 1 / 8 and abs(accuracy[12:].mean() - 0.1) < 0.015
pairs = come_back(model, test.tokens[:64], slice(1, 2 * N_SYMBOLS + 1))
assert pairs.max() < 0.6 * others.min()  # of ten runs: 0.19 to 0.38
for n_symbols in (2, 3):
    shorter = hop_prompts(64, n_symbols, seed=97)
    lags = come_back(model, shorter.tokens, shorter.query_pos)
    dips = lags[n_symbols - 1 :: n_symbols]
    rest = torch.stack([lags[k] for k in range(8) if (k + 1) % n_symbols])
    assert dips.max() < 0.8 * rest.mean()  # of ten runs: 0.06 to 0.63
