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
# # Quick start: a looped model in TransformerLens
#
# **Question.** A looped model runs the same few layers several times in one forward pass. It has one set of weights, but
# several answers: one after each loop. Where are they, and what changes in the TransformerLens code that you would write?
#
# **Experiment.** We load a small model that was trained to follow pointers, one step per loop. We watch its attention loop by
# loop, read out its answer after each loop, break one loop and leave the others alone, and loop more often than it was trained
# to. Everything runs on a CPU in seconds.
#
# [colab]: https://colab.research.google.com/github/tl-looped/tl_looped/blob/main/tutorials/01_quickstart.ipynb

# %%
try:
    import google.colab  # noqa: F401

    # %pip install -q 'tl-looped[viz]'
except ImportError:
    pass

# %%
from html import escape

import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
import torch
from transformer_lens.model_bridge import TransformerBridge

from tl_looped import LoopedBridge, LoopedError
from tl_looped.toys.hop import WORDS, hop_accuracy, hop_prompts

MODEL = "toy:hop"  # on a GPU, for example "ByteDance/Ouro-1.4B"
HOP = MODEL == "toy:hop"  # what is said about pointers is true of this model only
torch.set_grad_enabled(False)
pio.renderers.default = "plotly_mimetype+notebook_connected"

# %% [markdown]
# ## Load
#
# `LoopedBridge` is a `TransformerBridge`. Every execution of a layer is a block of its own, a *virtual layer*. So a model with
# a prelude of one layer, two looped layers and six loops has 1 + 2 × 6 = 13 blocks. All executions of one layer hold the same
# `Parameter` objects: more loops need no more memory for weights.

# %%
model = LoopedBridge.from_pretrained(MODEL, device="cpu" if HOP else None)  # else a GPU, where there is one
print("a TransformerBridge:", isinstance(model, TransformerBridge))
print(model.schedule)
print("virtual layers:", model.cfg.n_layers)

executions = [int(name.split(".")[1]) for name in model.expand_name("loops.*.blocks.0.hook_resid_pre")]
print("layer 0 of the loop runs as blocks", executions)
weights = [model.blocks[i].attn.q.weight for i in executions]
print("one set of weights:", all(weight is weights[0] for weight in weights))

# %% tags=["remove-cell"]
assert isinstance(model, TransformerBridge) and all(weight is weights[0] for weight in weights)
if HOP:
    assert (model.schedule.n_prelude, model.schedule.n_core, model.n_loops, model.cfg.n_layers) == (1, 2, 6, 13)

# %% [markdown]
# ## The task of the toy
#
# A prompt lists a mapping: a capital letter (key) and a small letter (its value), eight pairs in random order. After the `?` it
# asks for every key. The answer after loop 0 is the value of the key. After loop 1 it is the value of that value, and so on:
# **one hop per loop**.

# %%
if HOP:
    prompts = hop_prompts(seed=3)
    prompt = prompts.texts[0]
    right = [WORDS[token] for token in prompts.answers(model.n_loops)[:, 0, -1]]
    print("hops from the last query:", " -> ".join([prompt[-1], *right]))
else:
    prompt = "The capital of France is"
tokens = model.to_tokens(prompt)
str_tokens = model.to_str_tokens(prompt)
print(prompt)

# %% [markdown]
# ## Names
#
# Each hook point has the name that you know and a loop-indexed one. Both work in `run_with_cache`, `run_with_hooks`, `hooks`,
# `add_hook` and `cache[...]`. Indices start at 0, negative ones count from the end, `*` is any index and `a:b` a range.
#
# | where | name |
# |---|---|
# | layer `j` in loop `t` | `loops.{t}.blocks.{j}.{hook}` |
# | layers before and after the loop | `prelude.blocks.{j}.{hook}`, `coda.blocks.{j}.{hook}` |
# | a pass itself | `loops.{t}.hook_state` (entering), `.hook_injection`, `.hook_in`, `.hook_out` |

# %%
print(model.expand_name("loops.2.blocks.0.attn.hook_pattern"))
print(model.expand_name("loops.-1.blocks.0:2.hook_resid_post"))
print(model.expand_name("loops.1:3.hook_out"))

for wrong in ("loops.2.blocks.0.attn.hook_patern", f"loops.{model.n_loops}.hook_out"):
    try:
        model.expand_name(wrong)
    except LoopedError as error:
        print(f"\n{type(error).__name__}: {error}")

# %% [markdown]
# ## Cache
#
# The cache holds every loop. `cache.stack_loops` puts one activation of all loops into one tensor.

# %%
logits, cache = model.run_with_cache(tokens)
assert cache["loops.2.blocks.0.attn.hook_pattern"] is cache["pattern", executions[2]]
pattern = cache.stack_loops("pattern", layer=0)
print("pattern [loop, batch, head, query, key]:", tuple(pattern.shape))
print("resid_post [loop, layer, batch, pos, d_model]:", tuple(cache.stack_loops("resid_post").shape))

# %% [markdown]
# Where does the last position look, loop by loop? Layer 0 of the loop, mean over its heads:

# %%
loop_names = [f"loop {t}" for t in range(model.n_loops)]
token_names = [escape(f"{token} ({i})") for i, token in enumerate(str_tokens)]  # plotly reads <s> as a tag


def imshow(values, x, y, title):
    figure = px.imshow(values.tolist(), x=x, y=y, title=title, aspect="auto", color_continuous_scale="Blues", zmin=0, zmax=1)
    figure.update_layout(template="plotly_white", height=340)
    figure.show()


imshow(pattern[:, 0, :, -1].mean(1), token_names, loop_names, "Attention from the last position, layer 0 of the loop")

# %% [markdown]
# **What it shows.** In each loop all four heads look at one place: the value of the symbol that the query has reached. The same
# layer with the same weights looks somewhere else in every loop, because the state it reads is another one. A tool that has one
# name for all loops sees one of these rows only.
#
# It is no accident of this prompt. On 200 other prompts, at all eight queries, every head of layer 0 puts on average more than
# 90 % of its attention there in every loop.

# %% tags=["remove-cell"]
if HOP:
    many = hop_prompts(200, seed=5)
    _, seen = model.run_with_cache(many.tokens, names_filter="loops.*.blocks.0.attn.hook_pattern")
    answers = many.answers(model.n_loops) - WORDS.index("a")
    reached = torch.cat((many.queries[None], answers[:-1]))  # the symbol before each loop, [loop, batch, query]
    pair = (many.keys[None, :, None] == reached[..., None]).int().argmax(-1)
    value_pos = (2 + 2 * pair)[:, :, None, :, None].expand(-1, -1, 4, -1, -1)
    weight = seen.stack_loops("pattern", layer=0)[:, :, :, many.query_pos].gather(-1, value_pos)[..., 0]
    assert weight.mean((1, 3)).min() > 0.9  # [loop, head]
    looked_at = pattern[:, 0, :, -1].argmax(-1)  # [loop, head]
    assert (looked_at == looked_at[:, :1]).all() and len(set(looked_at[:, 0].tolist())) == 6
    assert [str_tokens[i] for i in looked_at[:, 0]] == right

# %% [markdown]
# ## An answer after every loop
#
# `model.readout(tokens, loop=t)` is what the model would answer if it stopped after loop `t`: its own way from the state to the
# logits. That is exactly what a model with fewer loops computes, and `model.unroll(t + 1)` is that model. To get all answers in
# one run, pass `on_loop=`.

# %%
by_loop = []
model(tokens, on_loop=lambda loop, logits: by_loop.append(logits[0, -1]))
probs = torch.stack(by_loop).float().softmax(-1)  # [loop, d_vocab]
for loop in range(model.n_loops):
    best = zip(*(part.tolist() for part in probs[loop].topk(3)), strict=True)
    said = "  ".join(f"{model.to_string([token])!r} {p:.3f}" for p, token in best)
    print(f"after loop {loop}: {said}" + (f"   right: {right[loop]}" if HOP else ""))

if HOP:
    imshow(probs[:, -8:], WORDS[-8:], loop_names, "Probability of each value at the last position")

# %% [markdown]
# **What it shows.** After each of its six loops the model names the next hop, each time with a probability above 0.99. This is
# not one answer that gets better from loop to loop. It is six different answers, and all of them are intended: this model was
# trained with a loss on every loop.

# %% tags=["remove-cell"]
for loop in range(model.n_loops):
    assert torch.equal(model.readout(tokens, loop=loop), model.unroll(loop + 1)(tokens))
assert torch.equal(torch.stack(by_loop)[-1], logits[0, -1])
if HOP:
    assert [WORDS[i] for i in probs.argmax(-1)] == right and probs.amax(-1).min() > 0.99

# %% [markdown]
# ## An intervention in one loop
#
# A hook under a loop-indexed name acts in that loop only. We switch off the attention of layer 0 once, in loop 2, and then in
# all loops.


# %%
def switch_off(attn_out, hook):
    return 0 * attn_out


def answers_with(hooks, prompts):
    """The answers after every loop, [loop, batch, query]."""
    found = []
    model.run_with_hooks(
        prompts.tokens, fwd_hooks=hooks, on_loop=lambda loop, logits: found.append(logits[:, prompts.query_pos].argmax(-1))
    )
    return torch.stack(found)


if HOP:
    fresh = hop_prompts(200, seed=6)
    found = {
        "no hook": answers_with([], fresh),
        "attention off in loop 2": answers_with([("loops.2.blocks.0.hook_attn_out", switch_off)], fresh),
        "attention off in all loops": answers_with([("loops.*.blocks.0.hook_attn_out", switch_off)], fresh),
    }
    accuracy = {name: (answers == fresh.answers(model.n_loops)).float().mean((1, 2)) for name, answers in found.items()}
    figure = go.Figure(
        layout={"template": "plotly_white", "xaxis_title": "loop", "yaxis_title": "right answers", "height": 340}
    )
    for name, values in accuracy.items():
        figure.add_scatter(x=list(range(model.n_loops)), y=values.tolist(), name=name)
        print(f"{name:27}", " ".join(f"{value:.2f}" for value in values))
    figure.show()

# %% [markdown]
# **What it shows.** Loops 0 and 1 do not notice: they run before the hook. From loop 2 on the answers are at chance, one in
# eight. The query has lost the symbol it stood at. It has not lost the ability to look up: by loop 5 more than nine answers in
# ten are the value of the answer one loop before. The chase goes on, from a wrong place.
#
# With one name for all loops you could only have drawn the lowest line, and would have learned that the layer matters.
#
# Hooks that change nothing change nothing: a run that is patched with its own cache returns the same bits.

# %%
own = [("loops.*.blocks.*.hook_resid_pre", lambda resid, hook: cache[hook.name])]
print("patched with its own cache, the same bits:", torch.equal(model.run_with_hooks(tokens, fwd_hooks=own), logits))

# %% tags=["remove-cell"]
assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=own), logits)
if HOP:
    broken = found["attention off in loop 2"]
    assert torch.equal(broken[:2], found["no hook"][:2]) and accuracy["no hook"].min() > 0.99
    assert abs(accuracy["attention off in loop 2"][2:] - 1 / 8).max() < 0.05
    assert abs(accuracy["attention off in all loops"] - 1 / 8).max() < 0.05
    first_value = WORDS.index("a")
    value = torch.zeros(200, len(WORDS), dtype=torch.long).scatter(1, fresh.keys + first_value, fresh.values + first_value)
    assert (value.gather(1, broken[4]) == broken[5]).float().mean() > 0.9

# %% [markdown]
# ## More loops than it was trained with
#
# `unroll` gives another view of the same parameters, with its own number of loops and its own hooks. We compare with a twin
# that was trained in the same way, but without *injection*: there, the prompt enters the state before loop 0 and never again.

# %%
if HOP:
    deep = {name: LoopedBridge.from_pretrained(name, device="cpu").unroll(16) for name in ("toy:hop", "toy:hop-noinject")}
    beyond = {name: hop_accuracy(one, fresh) for name, one in deep.items()}
    figure = go.Figure(
        layout={"template": "plotly_white", "xaxis_title": "loop", "yaxis_title": "right answers", "height": 340}
    )
    for name, values in beyond.items():
        figure.add_scatter(x=list(range(16)), y=values.tolist(), name=name)
        print(f"{name:17}", " ".join(f"{value:.2f}" for value in values))
    figure.add_vline(x=5.5, line={"dash": "dot"}, annotation_text="trained", annotation_position="bottom left")
    figure.show()

# %% [markdown]
# **What it shows.** Both models are right in all six trained loops. With injection the model goes on hopping for ten loops that
# it was never trained for, with more than 99 % right answers. Without injection it falls to chance.

# %% tags=["remove-cell"]
if HOP:
    assert all(values[:6].min() > 0.99 for values in beyond.values())
    assert beyond["toy:hop"].min() > 0.99 and abs(beyond["toy:hop-noinject"][12:] - 1 / 8).max() < 0.05

# %% [markdown]
# ## What this does not show
#
# - The toy was trained to answer in every loop. A looped language model is usually trained on the answer of its last loop, and
#   nothing forces its earlier readouts to make sense.
# - Attention that looks at the right place is no proof that the answer comes from there. The [next
#   tutorial](02_activation_patching_across_loops.ipynb) patches.
# - One pair of models with and without injection, from one training seed each, says that it can matter. It does not say that it
#   always does.
#
# ## Exercises
#
# **1.** Layer 1 of the loop also has four heads. Plot where they look. What do you expect to happen if you switch off the
# attention of layer 1 in all loops?
#
# <details><summary>Answer</summary>
#
# Use `layer=1` in `stack_loops`: the rows are spread over the prompt. With `("loops.*.blocks.1.hook_attn_out", switch_off)` the
# model is still right more than 99 times out of 100 in every loop. The second layer's attention is not needed here.
#
# </details>
#
# **2.** Switch off the attention of layer 0 in the last loop only. Which answers change?
#
# <details><summary>Answer</summary>
#
# Those after loop 5 alone: the name is `loops.5.blocks.0.hook_attn_out`, or `loops.-1.blocks.0.hook_attn_out`. Everything
# before is the same bits.
#
# </details>
#
# **3.** `model.unroll(3)(tokens)` and `model.readout(tokens, loop=2)` are the same. Which one do you use to *cache* the
# activations of a run of three loops, and why?
#
# <details><summary>Answer</summary>
#
# Either: `model.unroll(3).run_with_cache(tokens)` has names for three loops only, and `model.run_with_cache(tokens, loop=2)`
# runs the first three loops of this model. The unroll is better if you want the error for a name of loop 3.
#
# </details>

# %% tags=["remove-cell"]
if HOP:
    no_second = answers_with([("loops.*.blocks.1.hook_attn_out", switch_off)], fresh)
    assert (no_second == fresh.answers(6)).float().mean((1, 2)).min() > 0.99
    assert cache.stack_loops("pattern", layer=1)[:, 0, :, -1].mean(1).max() < 0.5
    at_the_end = answers_with([("loops.-1.blocks.0.hook_attn_out", switch_off)], fresh)
    assert torch.equal(at_the_end[:5], found["no hook"][:5]) and not torch.equal(at_the_end[5], found["no hook"][5])
    three, cache_of_three = model.run_with_cache(tokens, loop=2)
    assert torch.equal(three, model.unroll(3)(tokens)) and "loops.3.hook_out" not in cache_of_three
