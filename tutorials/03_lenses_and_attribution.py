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
# # Lenses and attribution
#
# **Question.** When in the run does the answer of a looped model appear? Which component of which loop writes it? And could the
# model have stopped earlier?
#
# **Experiment.** We decode every virtual layer of a small language model in two ways, and compare both with its true readout
# after each loop. We split a logit into exact contributions of all components. Then we check on a model whose algorithm we know
# what such contributions do not tell. At the end we look at exit gates, and at exits without a gate.
#
# *Outputs and numbers: `python tutorials/build.py 03_lenses_and_attribution`, two cores of a server, November 2026.*
#
# [colab]: https://colab.research.google.com/github/tl-looped/tl_looped/blob/main/tutorials/03_lenses_and_attribution.ipynb

# %%
try:
    import google.colab  # noqa: F401

    # %pip install -q 'tl-looped[viz]'
except ImportError:
    pass

# %%
import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
import torch

from tl_looped import LoopedBridge, LoopedConfig, exits
from tl_looped.analysis import exit_steps, gate_pdf
from tl_looped.lenses import logit_lens
from tl_looped.toys import hop_prompts
from tl_looped.toys.text import WINDOW, corpus, encode, loss_by_loop, windows

MODEL = "toy:text"  # on a GPU, for example "ByteDance/Ouro-1.4B", which has exit gates
TOY = MODEL == "toy:text"  # the numbers in the text are those of this model
torch.set_grad_enabled(False)
pio.renderers.default = "plotly_mimetype+notebook_connected"

model = LoopedBridge.from_pretrained(MODEL, device="cpu" if TOY else None)  # else a GPU, where there is one
print(model.schedule)

# %% [markdown]
# `toy:text` is a language model of the Python documentation: one layer, then three layers in four loops, then one more layer
# (the *coda*). It was trained on the loss of its **last** output only. We test it on documentation that it was not trained on.

# %%
ids = encode(model.tokenizer, corpus(held_out=True))
every = (6 if TOY else 60) * WINDOW  # fewer windows of a large model: each layer is read over the whole vocabulary
tokens = windows(ids, torch.arange(1, len(ids) - WINDOW, every))  # [batch, pos]
if model.tokenizer.bos_token_id is not None:
    tokens[:, 0] = model.tokenizer.bos_token_id
tokens = tokens.to(model.cfg.device)
print("held-out windows:", tuple(tokens.shape))

prompt = "If *file* is not provided, the output is prin" if TOY else "The capital of France is"
prompt_tokens = model.to_tokens(prompt)
logits, cache = model.run_with_cache(prompt_tokens)
best = logits[0, -1].float().softmax(-1).topk(3)
for p, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
    print(f"{model.to_string([token])!r}: {p:.2f}")
answer = int(best.indices[0])

# %% [markdown]
# ## Two lenses
#
# Both decode the residual stream that leaves a virtual layer.
#
# - `lens="logit"` is the logit lens that you know: last norm and unembedding.
# - `lens="native"` takes the model's *own* way from a state to the logits, as if the loop ended there. Here that is the coda,
#   the last norm and the unembedding.
#
# At the end of a loop the native lens is no approximation. It is the readout of the model with that many loops.

# %%
lenses = {lens: logit_lens(model, prompt_tokens, targets=answer, lens=lens, positions=-1) for lens in ("logit", "native")}
print(f"{'':16} {'logit lens':16} native lens")
all_labels = list(lenses["logit"].labels)
last = f"blocks.{model.schedule.n_core - 1}"  # of many layers, only those that end a pass
shown = [row for row, label in enumerate(all_labels) if len(all_labels) <= 24 or label.endswith(last) or row == 0]
for row in shown:
    label = all_labels[row]
    cells = [
        f"{model.to_string([int(lens.top_tokens[row, 0, 0, 0])])!r:8} rank {int(lens.ranks[row, 0, 0, 0]):<3}"
        for lens in lenses.values()
    ]
    print(f"{label:16} {cells[0]:16} {cells[1]}")
lenses["native"].plot().show()

# %% [markdown]
# **What it shows.** The toy completes the word: `prin`, `ted`. After the prelude the rank of `ted` is above 50 in both lenses.
# From the end of loop 1 on it is the top answer in both. Loops 2 and 3 make it more certain, and do not change it.
#
# One prompt is an anecdote. So we take the mean over the held-out text: how many nats does it cost to read each layer's
# prediction of the next token?

# %%
targets = tokens.roll(-1, 1)  # the last position has no target, and is left out below
found = {lens: logit_lens(model, tokens, targets=targets, lens=lens) for lens in ("logit", "native")}
loss = {lens: -result.log_probs[:, :, :-1, 0].mean((1, 2)).cpu() for lens, result in found.items()}  # [row]
true = loss_by_loop(model, tokens).mean(1).cpu()

figure = go.Figure(layout={"template": "plotly_white", "yaxis_title": "loss (nats per token)", "height": 420})
labels = list(found["logit"].labels)
for lens, values in loss.items():
    figure.add_scatter(x=labels, y=values.tolist(), name=f"{lens} lens", mode="lines+markers")
ends = [f"loops.{t}.blocks.{model.schedule.n_core - 1}" for t in range(model.n_loops)]
figure.add_scatter(
    x=ends, y=true.tolist(), name="readout after the loop", mode="markers", marker={"size": 12, "symbol": "circle-open"}
)
figure.show()

# %% [markdown]
# **What it shows.** The loss falls from loop to loop, and most in the first ones. The native lens meets the readout after each
# loop (circles). The logit lens is above it in every layer of the loop, because it skips the coda. By the logit lens, the state
# after the *last* loop knows less than the native lens reads after loop 1.
#
# So on a model with a coda, the logit lens says "late" where the model itself can already read the answer. How much of the gap
# is another basis, and how much is computed by the coda, this figure does not tell. The native lens (the coda lens of arXiv
# 2507.02199) has both.

# %% tags=["remove-cell"]
if TOY:
    core = [row for row, label in enumerate(labels) if label.startswith("loops.")]
    at_ends = [labels.index(end) for end in ends]
    torch.testing.assert_close(loss["native"][at_ends], true, atol=1e-4, rtol=0)
    assert (loss["logit"][core] > loss["native"][core] + 0.1).all()
    assert loss["logit"][at_ends[-1]] > loss["native"][at_ends[1]]
    assert (true.diff() < 0).all() and (true.diff().abs().diff() < 0).all()
    torch.testing.assert_close(loss["logit"][-1], loss["native"][-1], atol=1e-5, rtol=0)
    for lens in lenses.values():
        ranks = lens.ranks[:, 0, 0, 0]
        assert ranks[0] > 50 and ranks[at_ends[1] :].max() == 0
    assert (true.diff() < 0).all() and lenses["native"].log_probs[at_ends, 0, 0, 0].diff().min() > 0
    for loop in range(model.n_loops):
        expected = model.readout(prompt_tokens, loop=loop)[0, -1].log_softmax(-1)[answer]
        at = lenses["native"].at(loop, model.schedule.n_core - 1)
        torch.testing.assert_close(at.log_probs[0, 0, 0], expected, atol=1e-4, rtol=0)

# %% [markdown]
# ## Who writes the logit?
#
# Direct logit attribution assumes that the residual stream is one running sum. In a looped model it is in general not: it is
# normed, mixed and injected into between passes. `cache.attribute_logits` carries every contribution through all of that, with
# the norms' scales frozen at their values in this run. So the values **sum to the logit**, in every family, up to the rounding
# of the model's dtype.

# %%
parts = cache.attribute_logits(answer)  # [component, batch] at the last position
print(f"sum of {len(parts.labels)} contributions: {float(parts.values.sum()):.4f}")
print(f"logit of {model.to_string([answer])!r}:           {float(logits[0, -1, answer]):.4f}\n")
for label, value in parts.top(5):
    print(f"{label:26} {value:+.2f}")


def in_loop(attribution, loop):
    """What the components of one loop add, [component, batch]."""
    return attribution.values[[i for i, label in enumerate(attribution.labels) if label.startswith(f"loops.{loop}.")]]


by_loop = torch.stack([in_loop(parts, loop)[:, 0] for loop in range(model.n_loops)])
components = [label.removeprefix("loops.0.") for label in parts.labels if label.startswith("loops.0.")]
figure = px.imshow(
    by_loop.tolist(), x=components, y=[f"loop {t}" for t in range(model.n_loops)], aspect="auto",
    text_auto=".2f" if len(components) <= 12 else False,
    color_continuous_scale="RdBu", color_continuous_midpoint=0.0,
    title=f"Contributions to the logit of {model.to_string([answer])!r}",
)  # fmt: skip
figure.update_layout(template="plotly_white", height=max(360, 18 * model.n_loops)).show()

# %% [markdown]
# **What it shows.** The four loops write more than 80 % of this logit, each loop less than the one before. No single loop holds
# the answer. The attention of layer 1 pushes it in all four: the same heads with the same weights, four times.
#
# `unit="head"` and `unit="layer"` sum to the same logit.

# %% tags=["remove-cell"]
whole = float(logits[0, -1, answer])
close = 1e-3 if logits.dtype == torch.float32 else 4 * torch.finfo(logits.dtype).eps * max(1.0, abs(whole))
for unit in ("component", "layer", "head"):
    assert abs(float(cache.attribute_logits(answer, unit=unit).values.sum()) - whole) < close
stack, stack_labels = cache.decompose_resid(return_labels=True)
assert abs(float(cache.logit_attrs(stack, answer)[:, 0, -1].sum()) - whole) < close
if TOY:
    assert [model.to_string([answer])] == ["ted"] and by_loop.sum() > 0.8 * logits[0, -1, answer]
    assert (by_loop.sum(1) > 1).all() and (by_loop.sum(1).diff() < 0).all()
    assert components[2] == "blocks.1.attn_out" and by_loop[:, 2].min() > 0.5

# %% [markdown]
# ## What a contribution is not: a model that we know
#
# In `toy:hop` every loop looks up one pointer (see the [tutorial on patching](02_activation_patching_across_loops.ipynb)). The
# answer after six loops needs all six lookups. What does attribution say?

# %%
hop = LoopedBridge.from_pretrained("toy:hop", device="cpu")
prompts = hop_prompts(64, seed=3)
hop_logits, hop_cache = hop.run_with_cache(prompts.tokens)
sixth = prompts.answers(6)[5, :, -1]  # the right answer of the last query, [batch]
rows = torch.arange(64)
written = hop_cache.attribute_logits(sixth)  # [component, batch]


direct = torch.stack([in_loop(written, loop).sum(0).mean() for loop in range(6)])
needed = []
for loop in range(6):
    hooks = [(f"loops.{loop}.blocks.0.hook_attn_out", lambda attn_out, hook: 0 * attn_out)]
    broken = hop.run_with_hooks(prompts.tokens, fwd_hooks=hooks)
    needed.append((hop_logits - broken)[rows, -1, sixth].mean())
needed = torch.stack(needed)

figure = go.Figure(layout={"template": "plotly_white", "yaxis_title": "logits", "barmode": "group", "height": 380})
figure.add_bar(x=[f"loop {t}" for t in range(6)], y=direct.tolist(), name="written to the logit by this loop")
figure.add_bar(x=[f"loop {t}" for t in range(6)], y=needed.tolist(), name="lost without attention in this loop")
figure.show()

# %% [markdown]
# **What it shows.** Of the logit, more than 90 % are written in loop 5. The other loops write next to nothing. Yet each of them
# is needed: without the attention of any one loop, the logit of the right answer falls by more than half.
#
# There is no contradiction. Attribution follows what is *written* along linear paths. Attention patterns are constants to it.
# Loops 0 to 4 do their work by deciding **where loop 5 looks**, and no direct contribution can show that. Exact does not mean
# causal. Use patching for that.

# %% tags=["remove-cell"]
total = hop_logits[rows, -1, sixth]
torch.testing.assert_close(written.values.sum(0), total, atol=1e-3, rtol=0)
assert direct[5] > 0.9 * total.mean() and direct[:5].abs().max() < 0.05 * total.mean()
assert needed.min() > 0.5 * total.mean()

# %% [markdown]
# ## Exit gates
#
# Ouro has a gate: after every loop, a linear map of the state gives an *exit logit* for each token. With `lambda_t =
# sigmoid(logit_t)`, the probability to leave after loop `t` is `p_t = lambda_t (1 - lambda_0) ... (1 - lambda_{t-1})`, and the
# last loop gets what is left. The hook is `loops.{t}.hook_exit_logit`.
#
# Our toys have no gate. So, unless the constant at the top names a model with one, we make a random model of that kind, to see
# the names and shapes.

# %%
if model.looped_cfg.exit_gate:
    gated, gated_tokens = model, prompt_tokens
else:
    config = LoopedConfig(
        d_model=32, n_heads=4, d_vocab=50, n_core=2, n_loops=4, norm="sandwich", pass_norm=True, exit_gate=True
    )
    gated, gated_tokens = LoopedBridge.from_config(config, seed=0), torch.arange(10, 22)[None]
_, gates = gated.run_with_cache(gated_tokens, names_filter="loops.*.hook_exit_logit")
exit_logits = gates.stack_loops("hook_exit_logit").float()  # [loop, batch, pos]
pdf = gate_pdf(exit_logits)
print(list(gates), tuple(exit_logits.shape))
for loop, at in enumerate(pdf[:, 0].tolist()):
    print(f"p(leave after loop {loop}) by token:", " ".join(f"{p:.2f}" for p in at), f"  mean {sum(at) / len(at):.2f}")

# %% [markdown]
# **What it shows.** The gates of an untrained model are near one half, so the probabilities halve from loop to loop: on average
# over tokens about 0.5, then 0.25, and the last two loops share the rest. They sum to 1. A trained gate is interesting as far
# as it departs from that.

# %% tags=["remove-cell"]
torch.testing.assert_close(pdf.sum(0), torch.ones_like(pdf[0]))
leave = exit_logits.sigmoid()
torch.testing.assert_close(pdf[1], leave[1] * (1 - leave[0]))
if not model.looped_cfg.exit_gate:
    assert (pdf[:, 0].mean(-1) - torch.tensor([0.5, 0.25, 0.125, 0.125])).abs().max() < 0.05

# %% [markdown]
# ## Stopping without a gate
#
# A policy can also look at the readouts (`exits.KL`) or at the state (`exits.StateChange`): stop when the last loop has changed
# little. `exit_steps` asks after every loop, for every token, and scores what the tokens would have said when they left.

# %%
policies = [exits.KL(t) for t in (0.03, 0.1, 0.3)] + [exits.StateChange(t) for t in (0.2, 0.3, 0.4)]
if model.looped_cfg.exit_gate:
    policies += [exits.Gate(t) for t in (0.3, 0.6, 0.9)]
steps = exit_steps(model, tokens, policies=policies, verbose=False)
names = steps.loss.labels["policy"]
cost, nats = steps.cost.values, steps.loss.values
for name, c, n in zip(names, cost.tolist(), nats.tolist(), strict=True):
    print(f"{name:27} {c:.2f} loops per token, {n:.3f} nats")

fixed = slice(len(policies), None)
figure = go.Figure(
    layout={"template": "plotly_white", "xaxis_title": "loops per token", "yaxis_title": "loss (nats per token)"}
)
figure.add_scatter(x=cost[fixed].tolist(), y=nats[fixed].tolist(), name="the same number for all tokens", mode="lines+markers")
for name, c, n in zip(names[: len(policies)], cost.tolist(), nats.tolist(), strict=False):
    figure.add_scatter(x=[c], y=[n], name=name, mode="markers", marker={"size": 11})
figure.update_layout(height=420).show()

# %% [markdown]
# **What it shows.** `KL(0.03)` spends about half a loop less per token, and loses less than 0.03 nats. A policy that knows
# nothing, and gives some tokens one loop more than others at random, would lie on the line. No policy here is more than 0.005
# nats above it, so the change of the readout does say something about which tokens still need a loop. It is not much: no policy
# is more than 0.15 nats below the line.
#
# `model.exit_policy` makes `generate` use a policy. A token read after loop `t` has exactly the logits of `model.readout(text,
# loop=t)`.

# %%
model.exit_policy = exits.KL(0.1)
print(model.generate(prompt, max_new_tokens=12, do_sample=False, stop_at_eos=False, verbose=False))
print(model.generation_report)
# A token that loops on needs the keys and values of the tokens before it, which are then computed after all.
print("loops per new token:", model.generation_report.loops_per_token[0].tolist())
model.exit_policy = None

# %% tags=["remove-cell"]
if TOY:
    full = nats[-1]
    assert abs(cost[0] - 3.5) < 0.25 and nats[0] - full < 0.03
    by_count = nats[fixed]
    for c, n in zip(cost[: len(policies)].tolist(), nats.tolist(), strict=False):
        low = int(c)
        between = by_count[low - 1] + (c - low) * (by_count[min(low, 3)] - by_count[low - 1])
        assert -0.15 < n - between < 0.005, (c, n, between)

# %% [markdown]
# ## What this does not show
#
# - That the model has "decided" where a lens first shows the answer. A lens says what *could* be read out, and the native lens
#   what the model itself would read.
# - Which components are necessary. Attribution here misses five of six loops of a known algorithm.
# - Anything about trained gates. For that, change `MODEL`.
# - How policies compare on a large model: this one is small, has four loops, and was measured on some thirty windows of text.
#
# ## Exercises
#
# **1.** Decode `toy:hop` with both lenses. Do they differ? Why (not)?
#
# <details><summary>Answer</summary>
#
# They are the same. This model has no coda and no norm between passes, so its own way from a state to the logits *is* the last
# norm and the unembedding.
#
# </details>
#
# **2.** Attribute the difference between the logit of hop 6 and that of hop 5 (`incorrect_tokens=`) in `toy:hop`. Which loop
# appears that was invisible before?
#
# <details><summary>Answer</summary>
#
# Loop 4: together its components add more than one logit. It wrote hop 5 into the stream, and loop 5 has to remove it. Where
# the direction contains hop 5, its trace counts.
#
# </details>
#
# **3.** Set `model.exit_policy = exits.KL(1e9)`. After how many loops is every token read, and why not after the first?
#
# <details><summary>Answer</summary>
#
# After two. A divergence between two readouts needs two readouts.
#
# </details>

# %% tags=["remove-cell"]
both = [logit_lens(hop, prompts.tokens[:4], targets=10, lens=lens, positions=-1).log_probs for lens in ("logit", "native")]
torch.testing.assert_close(both[0], both[1], atol=1e-4, rtol=0)
fifth = prompts.answers(5)[4, :, -1]
difference = hop_cache.attribute_logits(sixth, fifth)
of_fourth, of_third = (in_loop(difference, loop).sum(0).mean() for loop in (4, 3))
assert of_fourth > 1 > 0.2 > abs(of_third)
model.exit_policy = exits.KL(1e9)
model.generate(prompt, max_new_tokens=3, do_sample=False, stop_at_eos=False, verbose=False)
assert (model.generation_report.loops_per_token == 2).all()
model.exit_policy = None
if TOY:
    assert len(tokens) in range(25, 34)
