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
# to. Everything runs on a CPU in less than a minute.
#
# With another `MODEL` all cells run on an English prompt. The text is about `toy:hop`.
#
# *Outputs and numbers: `python tutorials/build.py 01_quickstart`, two cores of a server, November 2026.*
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
from tl_looped.figures import attention_viewer
from tl_looped.toys.hop import WORDS, hop_accuracy, hop_prompts

MODEL = "toy:hop"  # on a GPU, for example "ByteDance/Ouro-1.4B"
HOP = MODEL == "toy:hop"  # the numbers in the text are those of this model
TOY = MODEL.startswith("toy:hop")  # the models that read pointers; others get an English prompt
torch.set_grad_enabled(False)
pio.renderers.default = "plotly_mimetype+notebook_connected"

# %% [markdown]
# ## Load
#
# `LoopedBridge` is a `TransformerBridge`. Every execution of a layer is a block of its own, a *virtual layer*. So a model with
# a prelude of one layer, two looped layers and six loops has 1 + 2 × 6 = 13 blocks. All executions of one layer hold the same
# `Parameter` objects: more loops need no more memory for weights.

# %%
model = LoopedBridge.from_pretrained(MODEL, device="cpu" if TOY else None)  # else a GPU, where there is one
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
if TOY:
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
#
# A cache of everything is large: by the sizes of its tensors, in bfloat16, about 15 MB per token for Ouro-1.4B, and about
# 55 MB per token for Huginn with 32 loops. With `names_filter="loops.*.blocks.0.attn.hook_pattern"`, or a list of names, it
# holds only what is named.

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
# `tl_looped.figures.attention_viewer` shows every head of every loop. Point at one to see it large, click to keep it. "minus
# the loop before" shows what a loop changes.

# %%
attention_viewer(cache)

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
shown = sorted({*range(0, model.n_loops, -(-model.n_loops // 8)), model.n_loops - 1})  # of many loops about eight
for loop in shown:
    best = zip(*(part.tolist() for part in probs[loop].topk(3)), strict=True)
    said = "  ".join(f"{model.to_string([token])!r} {p:.3f}" for p, token in best)
    print(f"after loop {loop}: {said}" + (f"   right: {right[loop]}" if TOY else ""))

# the eight values; of another model the tokens that are the answer after one of these loops
candidates = range(len(WORDS))[-8:] if TOY else list(dict.fromkeys(probs[shown].argmax(-1).tolist()))
names = WORDS[-8:] if TOY else [escape(f"{model.to_string([token])!r} ({token})") for token in candidates]
imshow(probs[:, list(candidates)], names, loop_names, "Probability of answers at the last position")

# %% [markdown]
# **What it shows.** After each of its six loops the model names the next hop, each time with a probability above 0.99. This is
# not one answer that gets better from loop to loop. It is six different answers, and all of them are intended: this model was
# trained with a loss on every loop.

# %% tags=["remove-cell"]
for loop in shown:
    assert torch.equal(model.readout(tokens, loop=loop), model.unroll(loop + 1)(tokens))
assert torch.equal(torch.stack(by_loop)[-1], logits[0, -1])
if HOP:
    assert [WORDS[i] for i in probs.argmax(-1)] == right and probs.amax(-1).min() > 0.99

# %% [markdown]
# ## An intervention in one loop
#
# A hook under a loop-indexed name acts in that loop only. We switch off the attention of layer 0 once, in loop 2, and then in
# all loops. The measure is the share of right answers on 1,000 prompts, at all eight queries. Another model has no right answer
# for every loop, so there it is the probability of the answer that the whole run gives.


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


def answer_probability(one, hooks=()):
    """After every loop, the probability of the answer that the model gives in the end, [loop]."""
    answer, found = int(logits[0, -1].argmax()), []
    one.run_with_hooks(
        tokens, fwd_hooks=list(hooks), on_loop=lambda loop, now: found.append(now[0, -1].float().softmax(-1)[answer])
    )
    return torch.stack(found)


def plot_lines(lines, measure):
    """Every line over the loops; of more than 16 numbers only some are printed."""
    figure = go.Figure(layout={"template": "plotly_white", "xaxis_title": "loop", "yaxis_title": measure, "height": 340})
    for name, values in lines.items():
        figure.add_scatter(x=list(range(len(values))), y=values.tolist(), name=name)
        print(f"{name:27}", " ".join(f"{value:.2f}" for value in values[:: -(-len(values) // 16)]))
    return figure


cases = {
    "no hook": [],
    "attention off in loop 2": [("loops.2.blocks.0.hook_attn_out", switch_off)],
    "attention off in all loops": [("loops.*.blocks.0.hook_attn_out", switch_off)],
}
if TOY:
    fresh = hop_prompts(1000, seed=6)
    found = {name: answers_with(hooks, fresh) for name, hooks in cases.items()}
    score = {name: (answers == fresh.answers(model.n_loops)).float().mean((1, 2)) for name, answers in found.items()}
else:
    score = {name: answer_probability(model, hooks) for name, hooks in cases.items()}
plot_lines(score, "right answers" if TOY else "probability of the answer").show()

# %% [markdown]
# **What it shows.** Loops 0 and 1 do not notice: they run before the hook. From loop 2 on near one in seven answers is right,
# little more than by chance, which is one in eight. The query has lost the symbol it stood at. It has not lost the ability to
# look up: by loop 5 more than nine answers in ten are the value of the answer one loop before. The chase goes on, from a wrong
# place. With the attention off in all loops the answers are at chance on average, and between one in ten and one in six after
# each loop.
#
# With one name for all loops you could only have drawn the lowest line, and would have learned that the layer matters.
#
# Hooks that change nothing change nothing: a run that is patched with its own cache returns the same bits.

# %%
own = [("loops.*.blocks.*.hook_resid_pre", lambda resid, hook: cache[hook.name])]
print("patched with its own cache, the same bits:", torch.equal(model.run_with_hooks(tokens, fwd_hooks=own), logits))

# %% tags=["remove-cell"]
assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=own), logits)
if not TOY:  # loops before the hook do not notice
    assert torch.equal(score["attention off in loop 2"][:2], score["no hook"][:2])
if HOP:
    broken = found["attention off in loop 2"]
    assert torch.equal(broken[:2], found["no hook"][:2]) and score["no hook"].min() > 0.99
    # the standard error is 0.004, so that 1/8 = 0.125 lies outside
    assert 0.13 < score["attention off in loop 2"][2:].min() and score["attention off in loop 2"][2:].max() < 0.16
    assert abs(score["attention off in loop 2"][2:].mean() - 1 / 7) < 0.01
    everywhere = score["attention off in all loops"]
    assert abs(everywhere.mean() - 1 / 8) < 0.01 and 0.09 < everywhere.min() and everywhere.max() < 1 / 6
    first_value = WORDS.index("a")
    value = torch.zeros(1000, len(WORDS), dtype=torch.long).scatter(1, fresh.keys + first_value, fresh.values + first_value)
    assert (value.gather(1, broken[4]) == broken[5]).float().mean() > 0.9

# %% [markdown]
# ## More loops than it was trained with
#
# `unroll` gives another view of the same parameters, with its own number of loops and its own hooks. We compare with a twin
# that was trained in the same way, but without *injection*: there, the prompt enters the state before loop 0 and never again.
# Another model runs alone, with twice its loops.

# %%
if TOY:
    deep = {name: LoopedBridge.from_pretrained(name, device="cpu").unroll(16) for name in ("toy:hop", "toy:hop-noinject")}
    beyond = {name: hop_accuracy(one, fresh) for name, one in deep.items()}
else:
    beyond = {MODEL: answer_probability(model.unroll(2 * model.n_loops))}
figure = plot_lines(beyond, "right answers" if TOY else "probability of the answer")
label = "trained" if TOY else "its own number of loops"
figure.add_vline(x=model.n_loops - 0.5, line={"dash": "dot"}, annotation_text=label, annotation_position="bottom left")
figure.show()

# %% [markdown]
# **What it shows.** Both models are right in all six trained loops. With injection the model goes on hopping for ten loops that
# it was never trained for, with more than 99 % right answers. Without injection it falls to about one in ten from loop 12 on,
# at or below chance.

# %% tags=["remove-cell"]
if HOP:
    assert all(values[:6].min() > 0.99 for values in beyond.values())
    assert beyond["toy:hop"].min() > 0.99
    late = beyond["toy:hop-noinject"][12:]
    assert 0.08 < late.min() and late.max() < 1 / 8 and abs(late.mean() - 0.1) < 0.01

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
