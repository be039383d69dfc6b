// The explorer: one screen on which a looped model is asked, loop by loop. Plain JavaScript, nothing from elsewhere.
//
// It talks to a `Session` in Python through a carrier, which is one of
//   overHttp(address, token)   the page of `tl-looped explore`
//   overWidget(model)          a notebook, through anywidget
//   frozen(data)               a page without Python: what it shows was computed before
// Everything that a token says goes into the page as text, never as HTML.

// ---------------------------------------------------------------- small things

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "text", "g", "rect"]);

// An element. Attributes beginning with "on" are listeners, the rest are set as they are; false and null leave one out.
function h(tag, attributes = {}, ...children) {
  const made = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "value") made.value = value;
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child != null && child !== false));
  return made;
}

// A token in which nothing is invisible: what is no letter, sign or space inside the text is written out.
export function visible(text) {
  if (text === "") return "(empty)";
  const signs = { "\n": "↵", "\r": "␍", "\t": "⇥" };
  const inner = text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => signs[c] ?? `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);
  return inner.replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

// What `packed` of the session made: {shape, at(i, j, k)}.
export function unpacked({ kind, shape, data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const values = kind === "float32" ? new Float32Array(bytes.buffer) : new Int32Array(bytes.buffer);
  const [, b = 1, c = 1] = shape;
  return { shape, values, at: (i, j = 0, k = 0) => values[(i * b + j) * c + k] };
}

const clamp = (x, low, high) => Math.max(low, Math.min(high, x));
const shown = (x) => (!Number.isFinite(x) ? "–" : x !== 0 && Math.abs(x) < 0.001 ? x.toExponential(1) : x.toFixed(3)).replace("-", "−");

// ---------------------------------------------------------------- carriers

export function overHttp(address, token) {
  return {
    // The reply comes as lines of JSON: {"share", "what"} while it works, at the end {"reply"}.
    async ask(message, onProgress, signal) {
      const headers = { "content-type": "application/json", "x-explorer-token": token };
      const response = await fetch(address, { method: "POST", headers, body: JSON.stringify(message), signal });
      if (!response.ok) throw new Error(await response.text());
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = ""; ; ) {
        const { value, done } = await reader.read();
        rest += value ?? "";
        const lines = rest.split("\n");
        rest = lines.pop();
        for (const line of lines) {
          const said = JSON.parse(line);
          if (said.reply) return said.reply;
          onProgress?.(said.share, said.what);
        }
        if (done) throw new Error("The program that serves this page has ended its answer early.");
      }
    },
    load: () => fromHash(location.hash),
    save: (state) => history.replaceState(null, "", toHash(state)),
    onOther: (load) => addEventListener("hashchange", () => load(fromHash(location.hash))),
    link: (state) => new URL(toHash(state), location.href).href,
  };
}

export const toHash = (state) => "#" + encodeURIComponent(JSON.stringify(state));
export function fromHash(hash) {
  try {
    const state = JSON.parse(decodeURIComponent(hash.slice(1)));
    return state && typeof state === "object" && !Array.isArray(state) ? state : {};
  } catch {
    return {};
  }
}

function overWidget(model) {
  const waiting = new Map();
  // A notebook that is run again from the start gets back what it showed, unless its code says what to show.
  const key = `tl-looped explorer ${location.pathname} ${model.get("name")}`;
  const remembered = () => { try { return JSON.parse(localStorage.getItem(key)) ?? {}; } catch { return {}; } };
  const remember = (state) => { try { localStorage.setItem(key, JSON.stringify(state)); } catch { /* there is no such store here */ } };
  let last = 0;
  const hear = (said) => {
    const task = waiting.get(said.id);
    if (!task) return;
    if (!said.reply) return task.onProgress?.(said.share, said.what);
    waiting.delete(said.id);
    task.resolve(said.reply);
  };
  model.on("msg:custom", hear);
  return {
    ask(message, onProgress, signal) {
      const id = `${Date.now()}.${++last}`;
      signal?.addEventListener("abort", () => model.send({ id, cancel: true }));
      return new Promise((resolve) => {
        waiting.set(id, { resolve, onProgress });
        model.send({ id, message });
      });
    },
    load: () => (Object.keys(model.get("state") ?? {}).length ? model.get("state") : remembered()),
    save: (state) => { model.set("state", state); model.save_changes(); remember(state); },
    onOther: (load) => model.on("change:state", () => load(model.get("state") ?? {})),
    end: () => {
      model.off("msg:custom", hear);
      for (const id of waiting.keys()) model.send({ id, cancel: true });
    },
  };
}

// What was computed before: {describe, state, grid, wrong}, where `wrong` lists the cells whose answer is known to be wrong.
export function frozen(data) {
  return {
    frozen: true,
    wrong: new Set((data.wrong ?? []).map(String)),
    ask: async (message) => data[message.ask] ?? { error: "This page holds what was computed before; ask with tl-looped explore." },
    load: () => data.state,
    save: () => {},
  };
}

// ---------------------------------------------------------------- colours

// The page's or the notebook's theme, or the system's where neither says, for as long as the signal lets it.
function follow(root, changed, signal) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const set = () => {
    const lab = document.body.dataset.jpThemeLight;
    const vscode = document.body.dataset.vscodeThemeKind;
    const is = lab ? lab === "false" : vscode ? !vscode.includes("light") : dark.matches;
    root.dataset.theme = is ? "dark" : "light";
    changed();
  };
  dark.addEventListener("change", set, { signal });
  const watcher = new MutationObserver(set);
  watcher.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] });
  signal?.addEventListener("abort", () => watcher.disconnect());
  set();
}
const backOf = (root) => (root.dataset.theme === "dark" ? [22, 26, 32] : [255, 255, 255]);
const mix = (from, to, t) => from.map((x, i) => Math.round(x + (to[i] - x) * t));
const css = ([r, g, b]) => `rgb(${r},${g},${b})`;
const linear = (v) => (v <= 10 ? v / 3295 : ((v / 255 + 0.055) / 1.055) ** 2.4);
const isLight = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) > 0.18; // black reads better on it
const HUES = { blue: [30, 110, 200], purple: [125, 75, 190], orange: [220, 110, 20], red: [200, 50, 45], green: [25, 140, 95] };
const LINES = ["#2f7fd6", "#d9730d", "#2e9e6b", "#9b59b6", "#c0392b", "#7f8c8d"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "1 4", "12 4"];

// What is known of a measure: what it is called, its hue, and where a value lies between 0 and 1 (below 0: the other hue).
function measures(words) {
  const token = (id) => `‘${visible(words[id] ?? String(id))}’`;
  return (name, pins) => {
    const [kind, digits] = name.split(":");
    const index = Number(digits);
    const who = pins.length ? token(pins[index]) : "its final answer";
    return {
      prob: { title: "probability of the top token", hue: "blue", fixed: 1, of: (g, r, c) => Math.exp(g.top_log_probs.at(r, c)) },
      entropy: { title: "entropy (nats)", hue: "purple", of: (g, r, c) => g.entropy.at(r, c) },
      kl: { title: "KL to the last row (nats)", hue: "orange", of: (g, r, c) => g.kl.at(r, c) },
      change: { title: "change since the loop before", hue: "green", of: (g, r, c) => g.change.at(r, c) },
      p: { title: `probability of ${who}`, hue: "blue", fixed: 1, of: (g, r, c) => Math.exp(g.log_probs.at(r, c, index)) },
      r: {
        title: `rank of ${who} (0 is the top)`, hue: "blue", of: (g, r, c) => g.ranks.at(r, c, index),
        share: (rank, most) => 1 - Math.log10(rank + 1) / Math.max(0.3, Math.log10(most + 1)),
      },
      sweep: { title: "effect of a patch (0: this prompt, 1: the second)", hue: "blue", fixed: 1, of: () => NaN },
    }[kind] ?? null;
  };
}

// ---------------------------------------------------------------- the grid

// Rows by columns on a canvas that shows what is in view; names of rows and columns stay. The data is
//   {rows: [{name, group, edge, mark}], columns: [{name, sub, other}], cell(r, c) -> {text, fill, corner, outline, dim}}
export class Grid {
  constructor(label, on = {}) {
    this.on = on;
    this.data = { rows: [], columns: [], cell: () => ({}) };
    [this.cursor, this.anchor, this.pinned, this.hover] = [[0, 0], null, null, null];
    [this.cw, this.rh, this.left, this.top] = [72, 21, 116, 38];
    this.canvas = h("canvas", { "aria-hidden": "true" });
    this.inside = h("div", { class: "tlx-inside" }, this.canvas);
    this.live = h("div", { class: "tlx-hidden", "aria-live": "polite" });
    this.scroller = h("div", { class: "tlx-scroll", tabindex: "0", role: "application", "aria-label": label,
      onscroll: () => this.later(), onkeydown: (e) => this.key(e), onfocus: () => this.later(), onblur: () => this.later() }, this.inside);
    this.element = h("div", { class: "tlx-grid" }, this.scroller, this.live);
    this.scroller.addEventListener("pointerdown", (e) => this.down(e));
    this.scroller.addEventListener("pointermove", (e) => this.move(e));
    this.scroller.addEventListener("pointerup", (e) => this.up(e));
    this.scroller.addEventListener("pointerleave", () => this.point(null));
    this.cutTexts = new Map();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.scroller);
  }

  set(data, { cw = 72, rh = 21, left = 116 } = {}) {
    this.top = data.columns.some((column) => column.other) ? 54 : 38; // a column may have a second token below its first
    if (cw !== this.cw || left !== this.left) this.cutTexts.clear();
    [this.data, this.cw, this.rh, this.left] = [data, cw, rh, left];
    this.cursor = [clamp(this.cursor[0], 0, Math.max(0, data.rows.length - 1)), clamp(this.cursor[1], 0, Math.max(0, data.columns.length - 1))];
    this.inside.style.width = `${this.width()}px`;
    this.inside.style.height = `${this.height()}px`;
    this.resize();
  }

  width() { return this.left + this.cw * this.data.columns.length + 1; }
  height() { return this.top + this.rh * this.data.rows.length + 1; }
  later() { this.frame ??= requestAnimationFrame(() => { this.frame = null; this.draw(); }); }

  resize() {
    const ratio = devicePixelRatio || 1;
    const [w, high] = [Math.min(this.scroller.clientWidth, this.width()), Math.min(this.scroller.clientHeight, this.height())];
    Object.assign(this.canvas, { width: Math.max(1, w * ratio), height: Math.max(1, high * ratio) });
    Object.assign(this.canvas.style, { width: `${w}px`, height: `${high}px` });
    this.draw();
  }

  draw() {
    const ratio = devicePixelRatio || 1;
    const context = this.canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.paint(context, this.scroller.scrollLeft, this.scroller.scrollTop, this.canvas.width / ratio, this.canvas.height / ratio, true);
  }

  // Draws the part of the grid that begins at (x0, y0), w by high pixels.
  paint(context, x0, y0, w, high, marks) {
    const style = getComputedStyle(this.element);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const [back, ink, quiet, line, warm, strong] = ["back", "ink", "quiet", "line", "warm", "strong"].map(colour);
    const { rows, columns, cell } = this.data;
    const { cw, rh, left, top } = this;
    context.direction = "ltr";
    context.textBaseline = "middle";
    context.fillStyle = back;
    context.fillRect(0, 0, w, high);
    const [r0, r1] = [Math.floor(y0 / rh), Math.min(rows.length, Math.ceil((y0 + high - top) / rh))];
    const [c0, c1] = [Math.floor(x0 / cw), Math.min(columns.length, Math.ceil((x0 + w - left) / cw))];
    const font = "ui-monospace, 'Cascadia Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace";
    context.font = `11.5px ${font}`;
    for (let r = r0; r < r1; r++) {
      for (let c = c0; c < c1; c++) {
        const { text = "", fill = null, corner, outline, dim } = cell(r, c);
        const [x, y] = [left + c * cw - x0, top + r * rh - y0];
        if (fill) { context.fillStyle = css(fill); context.fillRect(x, y, cw - 1, rh - 1); }
        context.globalAlpha = dim ? 0.45 : 1;
        context.fillStyle = fill ? (isLight(fill) ? "#101418" : "#ffffff") : ink;
        if (text) context.fillText(this.cut(context, text, cw - 9), x + 4, y + rh / 2);
        context.globalAlpha = 1;
        if (outline) { context.strokeStyle = warm; context.lineWidth = 2; context.strokeRect(x + 1, y + 1, cw - 3, rh - 3); }
        if (corner) {
          context.fillStyle = warm;
          context.beginPath(); context.moveTo(x + cw - 10, y); context.lineTo(x + cw - 1, y); context.lineTo(x + cw - 1, y + 9); context.fill();
        }
      }
    }
    const box = ([r, c], [r2, c2], kind, width) => {
      context.strokeStyle = kind; context.lineWidth = width;
      context.strokeRect(left + Math.min(c, c2) * cw - x0 + 0.5, top + Math.min(r, r2) * rh - y0 + 0.5,
        cw * (Math.abs(c2 - c) + 1) - 2, rh * (Math.abs(r2 - r) + 1) - 2);
    };
    context.save();
    context.beginPath(); context.rect(left, top, w - left, high - top); context.clip();
    for (let r = Math.max(r0, 1); r < r1; r++) {
      if (rows[r].group === rows[r - 1].group) continue;
      context.fillStyle = rows[r].edge || rows[r - 1].edge ? warm : quiet;
      context.fillRect(0, top + r * rh - y0 - 1, w, rows[r].edge || rows[r - 1].edge ? 2 : 1);
    }
    if (this.pinned) box(this.pinned, this.pinned, strong, 2.5);
    if (marks && this.anchor) box(this.anchor, this.cursor, warm, 2);
    if (marks && document.activeElement === this.scroller) { context.setLineDash([3, 2]); box(this.cursor, this.cursor, ink, 1.5); context.setLineDash([]); }
    if (marks && this.hover) box(this.hover, this.hover, quiet, 1.5);
    context.restore();
    // Names of rows.
    context.fillStyle = back;
    context.fillRect(0, top, left, high - top);
    context.save();
    context.beginPath(); context.rect(0, top, left, high - top); context.clip();
    for (let r = r0; r < r1; r++) {
      const [row, y] = [rows[r], top + r * rh - y0];
      if (row.mark) { context.fillStyle = warm; context.globalAlpha = 0.18; context.fillRect(0, y, left - 3, rh - 1); context.globalAlpha = 1; }
      context.font = `${row.edge ? "italic " : ""}11.5px system-ui, sans-serif`;
      context.fillStyle = this.pinned && this.pinned[0] === r ? strong : row.edge ? quiet : ink;
      context.fillText(this.cut(context, `${row.name}${row.mark ? " ›" : ""}`, left - 9), 4, y + rh / 2);
      if (r && row.group !== rows[r - 1].group) { context.fillStyle = row.edge || rows[r - 1].edge ? warm : quiet; context.fillRect(0, y - 1, left, row.edge || rows[r - 1].edge ? 2 : 1); }
    }
    context.restore();
    // Names of columns.
    context.fillStyle = back;
    context.fillRect(0, 0, w, top);
    context.save();
    context.beginPath(); context.rect(left, 0, w - left, top); context.clip();
    for (let c = c0; c < c1; c++) {
      const x = left + c * cw - x0;
      const is = this.pinned && this.pinned[1] === c;
      if (columns[c].other) { context.fillStyle = warm; context.globalAlpha = 0.18; context.fillRect(x, 0, cw - 1, top - 3); context.globalAlpha = 1; }
      context.fillStyle = is ? strong : quiet;
      context.font = "10px system-ui, sans-serif";
      context.fillText(columns[c].sub ?? String(c), x + 4, 10);
      context.fillStyle = is ? strong : ink;
      context.font = `${is ? "bold " : ""}11.5px ${font}`;
      for (const [i, name] of [columns[c].name, columns[c].other].entries()) if (name) context.fillText(this.cut(context, name, cw - 8), x + 4, 26 + 16 * i);
    }
    context.restore();
    context.fillStyle = line;
    context.fillRect(left - 2, 0, 1, high);
    context.fillRect(0, top - 2, w, 1);
  }

  cut(context, text, width) {
    const key = `${context.font} ${width} ${text}`;
    let found = this.cutTexts.get(key);
    if (found === undefined) {
      const letters = [...text];
      found = text;
      while (letters.length > 1 && context.measureText(found).width > width) { letters.pop(); found = letters.join("") + "…"; }
      if (this.cutTexts.size > 20000) this.cutTexts.clear();
      this.cutTexts.set(key, found);
    }
    return found;
  }

  at(event) {
    const box = this.scroller.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left - this.scroller.clientLeft, event.clientY - box.top - this.scroller.clientTop];
    if (x < this.left || y < this.top || x >= this.scroller.clientWidth || y >= this.scroller.clientHeight) return null;
    const c = Math.floor((x - this.left + this.scroller.scrollLeft) / this.cw);
    const r = Math.floor((y - this.top + this.scroller.scrollTop) / this.rh);
    return r >= 0 && c >= 0 && r < this.data.rows.length && c < this.data.columns.length ? [r, c] : null;
  }

  down(event) {
    const cell = this.at(event);
    if (!cell || event.button) return;
    [this.cursor, this.held, this.anchor] = [cell, cell, null];
    if (event.pointerType === "mouse") this.scroller.setPointerCapture(event.pointerId);
  }

  move(event) {
    const cell = this.at(event);
    if (this.held && cell && event.pointerType === "mouse" && String(cell) !== String(this.held)) {
      [this.anchor, this.cursor] = [this.held, cell];
      this.later();
    }
    this.point(cell, event);
  }

  up(event) {
    const cell = this.at(event);
    if (this.held && this.anchor) this.on.select?.(this.anchor, this.cursor);
    else if (this.held && cell && String(cell) === String(this.held)) this.on.pick?.(cell);
    this.held = null;
    this.later();
  }

  point(cell, event) {
    if (String(cell) !== String(this.hover)) { this.hover = cell; this.later(); }
    this.on.hover?.(cell, event);
  }

  key(event) {
    const page = Math.max(1, Math.floor((this.scroller.clientHeight - this.top) / this.rh) - 1);
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-page, 0], PageDown: [page, 0],
      Home: [0, -1e9], End: [0, 1e9] };
    const step = steps[event.key];
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (step) {
      if (event.shiftKey) this.anchor ??= this.cursor; else this.anchor = null;
      this.cursor = [clamp(this.cursor[0] + step[0], 0, this.data.rows.length - 1), clamp(this.cursor[1] + step[1], 0, this.data.columns.length - 1)];
      this.show(this.cursor);
      this.live.textContent = this.on.describe?.(this.cursor) ?? "";
      this.on.cursor?.(this.cursor);
    } else if (event.key === "Enter" || event.key === " ") this.on.pick?.(this.cursor);
    else if (event.key === "Escape") this.anchor = null;
    else if (!this.on.key?.(event.key, this.anchor ?? this.cursor, this.cursor)) return;
    event.preventDefault();
    this.later();
  }

  show([r, c]) {
    const [x, y] = [c * this.cw, r * this.rh];
    const [w, high] = [this.scroller.clientWidth - this.left - this.cw, this.scroller.clientHeight - this.top - this.rh];
    this.scroller.scrollLeft = clamp(this.scroller.scrollLeft, x - Math.max(0, w), x);
    this.scroller.scrollTop = clamp(this.scroller.scrollTop, y - Math.max(0, high), y);
  }

  // The whole grid as a canvas, or as much of it as a browser can hold.
  picture() {
    const most = 8000;
    const [w, high] = [Math.min(most, this.width()), Math.min(most, this.height())];
    const canvas = h("canvas", { width: 2 * w, height: 2 * high });
    const context = canvas.getContext("2d");
    context.scale(2, 2);
    this.paint(context, 0, 0, w, high, false);
    return canvas;
  }
}

// A grid of numbers that a page holds, to be read only, in an element; the data is
//   {title, rows, columns: [{name, sub, other}], values}, rows as in a grid and values [row, column] as packed
export function mountCells(host, data) {
  const [values, columns] = [unpacked(data.values), data.columns.map((one) => ({ ...one, name: visible(one.name), other: one.other == null ? null : visible(one.other) }))];
  const root = h("div", { class: "tlx" });
  const said = h("p", { class: "tlx-quiet", "aria-hidden": "true" });
  const number = (v) => (!Number.isFinite(v) ? "" : Math.abs(v) < 0.005 ? "0" : v.toFixed(2).replace("-", "−"));
  const most = values.values.reduce((high, v) => (Math.abs(v) > high ? Math.abs(v) : high), 1);
  const inWords = ([r, c]) => {
    const { sub, name, other } = columns[c];
    return `${data.rows[r].name}, position ${sub} ‘${name}’${other ? ` | ‘${other}’` : ""}: ${shown(values.at(r, c))}`;
  };
  const say = (cell) => { const at = cell ?? grid.pinned; said.textContent = at ? inWords(at) : "Point at a cell, or click it."; };
  const pick = (cell) => { grid.pinned = cell; say(cell); };
  const grid = new Grid(`${data.title}; arrow keys move, Enter pins a cell`, { pick, hover: say, cursor: say, describe: inWords });
  const legend = h("div", { class: "tlx-legend" });
  host.replaceChildren(root);
  root.append(grid.element, legend, said);
  say(null);
  follow(root, () => {
    const base = backOf(root);
    const has = values.values.some((v) => v < -0.05);
    const ends = [...(has ? [HUES.red] : []), base, HUES.blue];
    const fill = (v) => (Number.isFinite(v) ? mix(base, v < 0 ? HUES.red : HUES.blue, (0.9 * Math.abs(v)) / most) : null);
    const cell = (r, c) => ({ text: number(values.at(r, c)), fill: fill(values.at(r, c)), dim: number(values.at(r, c)) === "0" });
    legend.replaceChildren(h("span", {}, data.title), h("span", {}, has ? `−${shown(most)}` : "0"),
      h("span", { class: "tlx-ramp", style: `background:linear-gradient(90deg,${ends.map(css).join(",")})` }), h("span", {}, shown(most)));
    grid.set({ rows: data.rows, columns, cell }, { cw: 46, left: host.clientWidth < 600 ? 92 : 116 });
  });
  grid.show(grid.cursor = [0, columns.length - 1]); // the last position is the one that is answered
}

// Fills every place of a page without Python, whose data lies beside it.
export function mountAll() {
  for (const host of document.querySelectorAll(".tlx-host")) {
    const data = JSON.parse(host.nextElementSibling.textContent);
    if (data.values) mountCells(host, data); else mount(host, frozen(data));
  }
}

// ---------------------------------------------------------------- the screen

const FIRST = {
  prompt: "", tokens: null, other: "", loops: null, lens: "native", colour: "prob", show: "edited", pins: [], at: null, row: null,
  core: false, fold: 1, curve: "prob", edits: [], patch: null, answer: "", wrong: "",
};

const FIELDS = {
  stack: { title: "stack" }, loops: { title: "loops", value: "all" }, loop: { title: "loop", value: "1", number: true },
  from_loop: { title: "from loop", value: "1", number: true }, times: { title: "more times", value: "1", number: true },
  layers: { title: "layer", value: "0" }, heads: { title: "head", value: "0" }, positions: { title: "positions", value: "all" },
  toward: { title: "towards token", value: "" }, away: { title: "away from token", value: "" }, scale: { title: "strength", value: "1", number: true },
};
const SITE_TITLES = {
  resid_pre: "stream entering a layer", attn_out: "what attention adds", mlp_out: "what the MLP adds", z: "one head", state: "state entering a loop",
};

// Puts the screen into an element; returns what ends it.
export function mount(host, carrier) {
  const screen = new Screen(host, carrier);
  screen.start();
  return () => screen.end();
}

class Screen {
  constructor(host, carrier) {
    [this.host, this.carrier] = [host, carrier];
    this.state = { ...FIRST };
    this.reply = this.sweepReply = this.attentionReply = this.writtenReply = null;
    this.tool = "pin";
    this.gone = new AbortController();
    this.root = h("div", { class: "tlx" });
    host.replaceChildren(this.root);
    follow(this.root, () => { this.grid?.later(); this.looks?.later(); if (this.attentionReply) this.drawAttention(); }, this.gone.signal);
    this.tasks = new Map();
  }

  end() {
    this.gone.abort();
    clearTimeout(this.timer);
    this.stop();
    this.grid?.observer.disconnect();
    this.looks?.observer.disconnect();
    this.carrier.end?.();
    this.host.replaceChildren();
  }

  async start() {
    let about;
    try {
      about = await this.carrier.ask({ ask: "describe" });
    } catch (error) {
      about = { error: error.message };
    }
    if (about.error) return void this.root.append(h("p", { class: "tlx-error", role: "alert" }, about.error));
    this.about = about;
    this.root.replaceChildren(...this.build());
    const given = this.carrier.load();
    this.adopt(given);
    if (Object.keys(given).length) this.carrier.save(this.kept());
    this.carrier.onOther?.((state) => { if (JSON.stringify(this.kept()) !== JSON.stringify(state)) { this.adopt(state); this.run(); } });
    await this.run();
  }

  // Take over a state; what it does not say, or says in another kind of value, is as at first.
  adopt(given) {
    this.state = { ...FIRST, prompt: this.about.prompts[0], other: this.about.prompts[1], loops: this.about.n_loops };
    const kinds = { tokens: Array.isArray, loops: Number.isInteger, at: Number.isInteger, row: (v) => typeof v === "string",
      patch: (v) => v && Array.isArray(v.cells), pins: Array.isArray, edits: (v) => Array.isArray(v) && v.every((one) => one && typeof one === "object") };
    for (const [name, value] of Object.entries(given)) {
      if (name in FIRST && (kinds[name]?.(value) ?? typeof value === typeof FIRST[name])) this.state[name] = value;
    }
    this.showControls();
  }

  // The state without what is as at first.
  kept() {
    const kept = {};
    for (const [name, value] of Object.entries(this.state)) if (JSON.stringify(value) !== JSON.stringify(FIRST[name])) kept[name] = value;
    return kept;
  }

  set(changes, { again = true } = {}) {
    Object.assign(this.state, changes);
    if ("prompt" in changes || "tokens" in changes || "other" in changes || "loops" in changes) {
      this.sweepReply = null;
      if (this.state.colour === "sweep") this.state.colour = "prob";
    }
    this.carrier.save(this.kept());
    if (!again) return this.refresh();
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.run(), 150);
  }

  // ---- what is on the screen

  build() {
    const { about, carrier } = this;
    const on = (name, make) => (event) => this.set(make(event.target), name);
    const c = (this.controls = {});
    const option = (value, title, why) => h("option", { value, disabled: Boolean(why), title: why || null }, title + (why ? " – not here" : ""));
    const field = (title, control, more) => h("label", { class: `tlx-field ${more ?? ""}` }, h("span", {}, title), control);

    c.prompt = h("textarea", { rows: 2, spellcheck: "false", "aria-label": "prompt", dir: "auto",
      onkeydown: (e) => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); this.typed(); } }, onchange: () => this.typed() });
    c.go = h("button", { class: "tlx-main", onclick: () => this.typed(true) }, "Run");
    c.loops = h("input", { type: "range", min: 1, max: 64, "aria-label": "number of loops", oninput: on({}, (t) => ({ loops: +t.value })) });
    c.loopsTyped = h("input", { type: "number", min: 1, max: 1024, "aria-label": "number of loops, typed",
      onchange: (e) => { const n = Math.round(+e.target.value); if (n >= 1) this.set({ loops: n }); } });
    c.lens = h("select", { onchange: on({}, (t) => ({ lens: t.value })) }, about.lenses.map(({ lens, title, why }) => option(lens, `${lens}: ${title}`, why)));
    c.colour = h("select", { onchange: on({ again: false }, (t) => ({ colour: t.value })) });
    c.fold = h("select", { onchange: on({ again: false }, (t) => ({ fold: +t.value })) },
      [1, 2, 3, 4, 6, 8, 12, 24].map((n) => option(n, n === 1 ? "every layer" : `one layer in ${n}`)));
    c.core = h("input", { type: "checkbox", onchange: on({ again: false }, (t) => ({ core: t.checked })) });
    c.show = h("select", { onchange: on({ again: false }, (t) => ({ show: t.value })) },
      option("edited", "edited run"), option("unedited", "unedited run"), option("difference", "difference"));
    c.showField = field("Show", c.show);
    c.foldField = field("Rows", c.fold);
    c.coreField = h("label", { class: "tlx-check" }, c.core, "loops only");
    c.pin = h("input", { type: "text", size: 8, "aria-label": "token to follow", placeholder: "token", onkeydown: (e) => { if (e.key === "Enter") this.follow(c.pin.value); } });
    c.pins = h("ul", { class: "tlx-chips", "aria-label": "tokens that are followed" });
    c.status = h("div", { class: "tlx-status", role: "status" });
    c.bar = h("progress", { max: 1, value: 0, "aria-label": "progress" });
    c.said = h("span");
    c.stop = h("button", { onclick: () => this.stop() }, "Stop");
    c.working = h("div", { class: "tlx-working", hidden: true }, c.bar, c.said, c.stop);
    c.error = h("p", { class: "tlx-error", role: "alert", hidden: true });
    c.legend = h("div", { class: "tlx-legend" });
    c.tip = h("div", { class: "tlx-tip", hidden: true, "aria-hidden": "true" });
    c.cell = h("div", { class: "tlx-cell", role: "group", "aria-label": "pinned cell" });
    c.curves = h("div", { class: "tlx-curves", role: "group", "aria-label": "followed tokens over all layers" });

    this.grid = new Grid("what every layer says at every position; arrow keys move, Enter pins a cell, P patches it, Shift selects several", {
      pick: (cell) => this.pick(cell),
      select: (a, b) => { if (this.tool === "patch") this.patch(a, b); },
      hover: (cell, event) => this.tip(cell, event),
      describe: ([r, col]) => this.inWords(r, col),
      key: (key, a, b) => (key === "p" || key === "P" ? (this.patch(a, b), true) : false),
    });

    const head = h("header", {}, h("h1", {}, about.name), h("p", { class: "tlx-quiet" }, about.runs,
      about.made_for ? `; made for ${about.made_for}` : "", about.note ? ` ${about.note}` : ""));
    const asking = h("div", { class: "tlx-row tlx-asking" },
      field(about.has_tokenizer ? "Prompt" : "Prompt (token ids)", c.prompt, "tlx-wide"), c.go);
    const settings = h("div", { class: "tlx-row" },
      field("Loops", h("span", { class: "tlx-row tlx-tight" }, c.loops, c.loopsTyped)), field("Lens", c.lens));
    const looks = h("div", { class: "tlx-row" }, field("Colour", c.colour), c.foldField, c.coreField, c.showField,
      h("span", { class: "tlx-row tlx-tight" }, field("Follow", c.pin), h("button", { onclick: () => this.follow(c.pin.value) }, "Follow"), c.pins));
    const beside = h("div", { class: "tlx-beside" }, h("div", { class: "tlx-left" }, this.grid.element, c.legend, c.curves), h("div", { class: "tlx-right" }, c.cell));
    if (carrier.frozen) {
      const rows = h("div", { class: "tlx-row" }, field("Colour", c.colour), c.foldField, c.coreField, c.showField, c.pins);
      return [rows, c.error, beside, c.tip];
    }
    return [head, asking, settings, looks, c.working, c.error, beside,
      h("div", { class: "tlx-panels" }, this.buildEdits(), this.buildPatch(), this.buildAttention(), this.buildWriting(), this.buildTaking()), c.tip, c.status];
  }

  panel(title, name, ...children) {
    const made = h("details", { ontoggle: () => made.open && this.opened(name) }, h("summary", {}, title), h("div", { class: "tlx-panel" }, ...children));
    this.controls[`${name}Panel`] = made;
    return made;
  }

  opened(name) {
    if (name === "attention" && !this.attentionReply) this.askAttention();
  }

  buildEdits() {
    const { about, controls: c } = this;
    const form = h("span", { class: "tlx-row" });
    c.editKind = h("select", { "aria-label": "intervention", onchange: () => this.editForm() },
      about.edits.map(({ kind, title, why }) => h("option", { value: kind, disabled: Boolean(why), title: why || null }, title)));
    c.editForm = form;
    c.edits = h("ul", { class: "tlx-chips", "aria-label": "interventions" });
    const missing = about.edits.filter((edit) => edit.why);
    const made = this.panel("Interventions", "edits", c.edits, h("div", { class: "tlx-row" }, h("label", { class: "tlx-field" }, h("span", {}, "Do"), c.editKind), form,
      h("button", { class: "tlx-main", onclick: () => this.addEdit() }, "Add")),
      h("p", { class: "tlx-quiet" }, "Loops, layers, heads and positions are numbers from 0: all, last, 2, 1,3 or 2:4."),
      missing.length ? h("p", { class: "tlx-quiet" }, "Not offered: ", missing.map((edit) => edit.title).join(", "), ". ", [...new Set(missing.map((e) => e.why))].join(" ")) : null);
    this.editForm();
    return made;
  }

  editForm() {
    const { about, controls: c } = this;
    const edit = about.edits.find(({ kind }) => kind === c.editKind.value);
    c.editFields = {};
    c.editForm.replaceChildren(...edit.fields.map((name) => {
      const { title, value, number } = FIELDS[name];
      const control = name === "stack" ? h("select", {}, edit.stacks.map((stack) => h("option", {}, stack)))
        : h("input", { type: number ? "number" : "text", step: name === "scale" ? "any" : null, size: 6, value });
      c.editFields[name] = control;
      return h("label", { class: "tlx-field" }, h("span", {}, title), control);
    }));
  }

  addEdit() {
    const { controls: c } = this;
    const edit = { kind: c.editKind.value, on: true };
    for (const [name, control] of Object.entries(c.editFields)) edit[name] = FIELDS[name].number ? Number(control.value) : control.value;
    this.set({ edits: [...this.state.edits, edit] });
    this.showEdits();
  }

  showEdits() {
    const { about, controls: c, state } = this;
    if (!c.edits) return;
    const said = (edit) => {
      const kind = about.edits.find(({ kind }) => kind === edit.kind);
      return [kind?.title ?? String(edit.kind), ...(kind?.fields ?? []).filter((f) => edit[f] !== undefined && edit[f] !== "all" && edit[f] !== "" && (f !== "stack" || kind.stacks.length > 1 && edit[f] !== "core")).map((f) => `${FIELDS[f].title} ${edit[f]}`)].join(" · ");
    };
    c.edits.replaceChildren(...state.edits.map((edit, i) => {
      const change = (next) => { this.set({ edits: state.edits.flatMap((one, k) => (k === i ? next : [one])) }); this.showEdits(); };
      return h("li", {}, h("label", {}, h("input", { type: "checkbox", checked: edit.on !== false, onchange: (e) => change([{ ...edit, on: e.target.checked }]) }), said(edit)),
        h("button", { "aria-label": `remove: ${said(edit)}`, onclick: () => change([]) }, "×"));
    }));
  }

  buildPatch() {
    const { about, controls: c } = this;
    c.other = h("textarea", { rows: 2, spellcheck: "false", "aria-label": "second prompt", dir: "auto",
      onkeydown: (e) => { if (e.key === "Enter" && !e.shiftKey) { e.preventDefault(); e.target.blur(); } }, onchange: (e) => this.set({ other: e.target.value }) });
    c.site = h("select", { "aria-label": "what is patched", onchange: () => this.changeSite() }, about.sites.map((site) => h("option", { value: site }, SITE_TITLES[site])));
    c.siteHead = h("input", { type: "number", min: 0, max: about.n_heads - 1, value: 0, "aria-label": "head that is patched", onchange: () => this.changeSite() });
    c.tools = h("select", { "aria-label": "what a click on the grid does", onchange: (e) => { this.tool = e.target.value; } },
      h("option", { value: "pin" }, "pins the cell"), h("option", { value: "patch" }, "patches the cell (drag: several)"));
    c.patched = h("span", { class: "tlx-quiet" });
    c.answer = h("input", { type: "text", size: 8, placeholder: "its answer", "aria-label": "answer to the second prompt", onchange: (e) => this.set({ answer: e.target.value }, { again: false }) });
    c.wrong = h("input", { type: "text", size: 8, placeholder: "its answer", "aria-label": "answer to the first prompt", onchange: (e) => this.set({ wrong: e.target.value }, { again: false }) });
    return this.panel("Patch from a second prompt", "patch",
      h("div", { class: "tlx-row" }, h("label", { class: "tlx-field tlx-wide" }, h("span", {}, "Second prompt, of as many tokens"), c.other)),
      h("div", { class: "tlx-row" }, h("label", { class: "tlx-field" }, h("span", {}, "What"), c.site), h("label", { class: "tlx-field" }, h("span", {}, "head"), c.siteHead),
        h("label", { class: "tlx-field" }, h("span", {}, "A click on the grid"), c.tools),
        h("button", { onclick: () => this.clearPatch() }, "Take patches out"), c.patched),
      h("div", { class: "tlx-row" }, h("label", { class: "tlx-field" }, h("span", {}, "Towards"), c.answer), h("label", { class: "tlx-field" }, h("span", {}, "away from"), c.wrong),
        h("button", { class: "tlx-main", onclick: () => this.sweep() }, "Sweep every cell")));
  }

  changeSite() {
    const { state, controls: c } = this;
    c.siteHead.parentElement.hidden = c.site.value !== "z";
    this.sweepReply = null;
    if (state.colour === "sweep") state.colour = "prob";
    // A state belongs to a loop and the others to layers: patched cells do not carry over between them.
    const keep = state.patch && (state.patch.site === "state") === (c.site.value === "state");
    this.set({ patch: { on: true, site: c.site.value, head: Number(c.siteHead.value), cells: keep ? state.patch.cells : [] } }, { again: Boolean(state.patch?.cells.length) });
  }

  clearPatch() {
    const had = this.state.patch?.cells.length;
    this.set({ patch: null }, { again: Boolean(had) });
  }

  place(row) {
    return this.controls.site?.value === "state" ? row.pass : row.name;
  }

  patch(a, b) {
    const { state, controls: c } = this;
    if (this.carrier.frozen) return;
    const rows = this.view.rows.slice(Math.min(a[0], b[0]), Math.max(a[0], b[0]) + 1);
    const names = [...new Set(rows.map((row) => this.place(row.twinRow ?? row)).filter(Boolean))];
    if (!names.length) return this.fail("The state of a loop was chosen, and this row is outside the loops; choose another row, or patch a layer.");
    const chosen = names.flatMap((name) => Array.from({ length: Math.abs(b[1] - a[1]) + 1 }, (_, k) => [name, Math.min(a[1], b[1]) + k]));
    const have = new Set((state.patch?.cells ?? []).map(String));
    const all = chosen.every((cell) => have.has(String(cell)));
    const cells = all ? (state.patch?.cells ?? []).filter((cell) => !chosen.some((one) => String(one) === String(cell)))
      : [...(state.patch?.cells ?? []), ...chosen.filter((cell) => !have.has(String(cell)))];
    this.set({ patch: { on: true, site: c.site.value, head: Number(c.siteHead.value), cells } });
  }

  buildAttention() {
    const { about, controls: c } = this;
    const again = () => { this.showAttentionLayers(); this.askAttention(); };
    c.attStack = h("select", { "aria-label": "stack", onchange: again }, Object.keys(about.stacks).map((stack) => h("option", { value: stack, selected: stack === about.core_stacks.at(-1) }, stack)));
    c.attLayer = h("select", { "aria-label": "layer of the head", onchange: () => this.askAttention() });
    c.attHead = h("select", { "aria-label": "head", onchange: () => this.askAttention() }, Array.from({ length: about.n_heads }, (_, i) => h("option", {}, i)));
    this.showAttentionLayers();
    c.attSaid = h("p", { class: "tlx-quiet", "aria-live": "polite" });
    c.tiles = h("canvas", { class: "tlx-tiles", tabindex: 0, role: "application", "aria-label": "the head's pattern in every loop; arrow keys choose query and key, [ and ] the loop",
      onpointermove: (e) => this.pointTiles(e), onpointerdown: (e) => this.pointTiles(e), onkeydown: (e) => this.keyTiles(e) });
    this.looks = new Grid("what every loop looks at from the pinned position", {});
    this.looks.element.classList.add("tlx-low");
    c.looksTitle = h("h3");
    return this.panel("Attention of one head, in all loops", "attention",
      h("div", { class: "tlx-row" }, h("label", { class: "tlx-field" }, h("span", {}, "Stack"), c.attStack), h("label", { class: "tlx-field" }, h("span", {}, "Layer"), c.attLayer), h("label", { class: "tlx-field" }, h("span", {}, "Head"), c.attHead)),
      c.attSaid, h("div", { class: "tlx-tilebox" }, c.tiles), c.looksTitle, this.looks.element);
  }

  showAttentionLayers() {
    const c = this.controls;
    const kept = c.attLayer.value;
    c.attLayer.replaceChildren(...Array.from({ length: this.about.stacks[c.attStack.value] }, (_, i) => h("option", {}, i)));
    if (+kept < c.attLayer.length) c.attLayer.value = kept || 0;
  }

  async askAttention() {
    const c = this.controls;
    if (!c.attentionPanel?.open || !this.reply) return;
    const reply = await this.ask({ ask: "attention", stack: c.attStack.value, layer: +c.attLayer.value, head: +c.attHead.value, unedited: this.state.show === "unedited" });
    if (!reply) return;
    this.attentionReply = { ...reply, patterns: unpacked(reply.patterns), looks_at: unpacked(reply.looks_at), words: this.words };
    const { looks_at } = this.attentionReply;
    const last = reply.labels.length - 1;
    const strongest = Array.from({ length: looks_at.shape[1] }, (_, k) => k).reduce((a, b) => (looks_at.at(last, b) > looks_at.at(last, a) ? b : a));
    this.tile = [last, reply.at, strongest];
    this.drawAttention();
  }

  drawAttention() {
    const { attentionReply: a, controls: c } = this;
    const [n_loops, queries, keys] = a.patterns.shape;
    const style = getComputedStyle(this.root);
    const [back, ink, strong] = ["back", "ink", "strong"].map((name) => style.getPropertyValue(`--${name}`).trim());
    const size = Math.max(1, Math.floor(132 / keys));
    const [w, high] = [size * keys, size * queries];
    const room = Math.max(200, c.tiles.parentElement.clientWidth - 4);
    const across = Math.max(1, Math.min(n_loops, Math.floor(room / (Math.max(w, 56) + 14))));
    const step = [Math.max(w, 56) + 14, high + 26];
    const ratio = devicePixelRatio || 1;
    const total = [across * step[0], Math.ceil(n_loops / across) * step[1]];
    Object.assign(c.tiles, { width: total[0] * ratio, height: total[1] * ratio });
    Object.assign(c.tiles.style, { width: `${total[0]}px`, height: `${total[1]}px` });
    this.tiles = { size, across, step, w, high };
    const context = c.tiles.getContext("2d");
    context.scale(ratio, ratio);
    const base = backOf(this.root);
    for (let t = 0; t < n_loops; t++) {
      const [x, y] = [(t % across) * step[0], Math.floor(t / across) * step[1] + 18];
      context.fillStyle = this.tile?.[0] === t ? strong : ink;
      context.font = "11px system-ui, sans-serif";
      context.fillText(a.labels[t], x + 1, y - 5);
      const image = context.createImageData(keys, queries);
      for (let i = 0; i < queries * keys; i++) {
        const v = Math.sqrt(clamp(a.patterns.values[t * queries * keys + i], 0, 1));
        image.data.set([...mix(base, HUES.blue, v), 255], 4 * i);
      }
      const small = h("canvas", { width: keys, height: queries });
      small.getContext("2d").putImageData(image, 0, 0);
      context.imageSmoothingEnabled = false;
      context.drawImage(small, x, y, w, high);
      context.strokeStyle = this.tile?.[0] === t ? strong : ink;
      context.globalAlpha = this.tile?.[0] === t ? 1 : 0.25;
      context.strokeRect(x - 0.5, y - 0.5, w + 1, high + 1);
      context.globalAlpha = 1;
      if (this.tile && this.tile[1] >= a.first) {
        context.strokeStyle = strong;
        context.strokeRect(x - 0.5, y + (this.tile[1] - a.first) * size - 0.5, w + 1, size + 1);
      }
    }
    this.sayTile();
    const words = this.reply.tokens.map((id) => visible(this.reply.words[id]));
    c.looksTitle.textContent = `What each loop looks at from position ${a.at}, ‘${words[a.at]}’`;
    this.looks.pinned = null;
    this.looks.set({
      rows: a.labels.map((name, i) => ({ name, group: i })),
      columns: words.map((name) => ({ name })),
      cell: (r, col) => { const v = a.looks_at.at(r, col); return { text: col > a.at && v === 0 ? "" : v.toFixed(2), fill: mix(base, HUES.blue, Math.sqrt(v)) }; },
    }, { cw: 54, left: 84 });
  }

  sayTile() {
    const { attentionReply: a, controls: c } = this;
    const [t, q, k] = this.tile;
    const word = (i) => `${i} ‘${visible(this.reply.words[this.reply.tokens[i]])}’`;
    c.attSaid.textContent = q < a.first ? `Only the last ${a.patterns.shape[1]} queries are shown.`
      : `${a.labels[t]}: position ${word(q)} looks at ${word(k)} with weight ${shown(a.patterns.at(t, q - a.first, k))}` + (a.first ? `. The last ${a.patterns.shape[1]} queries are shown.` : "");
  }

  pointTiles(event) {
    const { attentionReply: a, tiles } = this;
    if (!a) return;
    const box = event.target.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const [col, line] = [Math.floor(x / tiles.step[0]), Math.floor(y / tiles.step[1])];
    const [k, q] = [Math.floor((x - col * tiles.step[0]) / tiles.size), Math.floor((y - line * tiles.step[1] - 18) / tiles.size)];
    const t = line * tiles.across + col;
    const [n_loops, queries, keys] = a.patterns.shape;
    if (col >= tiles.across || t >= n_loops || k < 0 || q < 0 || k >= keys || q >= queries) return;
    this.tile = [t, q + a.first, k];
    if (event.type === "pointerdown") this.drawAttention(); else this.sayTile();
  }

  keyTiles(event) {
    const { attentionReply: a } = this;
    if (!a) return;
    const step = { ArrowUp: [0, -1, 0], ArrowDown: [0, 1, 0], ArrowLeft: [0, 0, -1], ArrowRight: [0, 0, 1], "[": [-1, 0, 0], "]": [1, 0, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    const [n_loops, , keys] = a.patterns.shape;
    this.tile = [clamp(this.tile[0] + step[0], 0, n_loops - 1), clamp(this.tile[1] + step[1], a.first, keys - 1), clamp(this.tile[2] + step[2], 0, keys - 1)];
    this.drawAttention();
  }

  buildWriting() {
    const { about, controls: c } = this;
    c.n = h("input", { type: "number", min: 1, max: 256, value: 8, "aria-label": "tokens to generate" });
    c.policy = h("select", { "aria-label": "exit policy", onchange: () => { c.threshold.value = about.policies.find((p) => p.policy === c.policy.value).threshold; c.threshold.parentElement.hidden = c.policy.value === "none"; } },
      about.policies.map(({ policy, title, why }) => h("option", { value: policy, disabled: Boolean(why), title: why || null }, title + (why ? " – not here" : ""))));
    c.threshold = h("input", { type: "number", step: "any", min: 0, value: 0, "aria-label": "threshold" });
    c.written = h("div", { class: "tlx-written" });
    const missing = about.policies.filter((p) => p.why);
    const made = this.panel("Generate", "writing", h("div", { class: "tlx-row" }, h("label", { class: "tlx-field" }, h("span", {}, "Tokens"), c.n), h("label", { class: "tlx-field" }, h("span", {}, "Stop looping by"), c.policy),
      h("label", { class: "tlx-field" }, h("span", {}, "below (gate: above)"), c.threshold), h("button", { class: "tlx-main", onclick: () => this.write() }, "Generate")),
      missing.length ? h("p", { class: "tlx-quiet" }, missing[0].why) : null, c.written);
    c.threshold.parentElement.hidden = true;
    return made;
  }

  async write() {
    const c = this.controls;
    const reply = await this.ask({ ask: "generate", n: Math.round(+c.n.value), policy: c.policy.value, threshold: +c.threshold.value, unedited: this.state.show === "unedited" });
    if (!reply) return;
    const mean = reply.loops.filter((n) => n > 0);
    c.written.replaceChildren(
      h("p", { class: "tlx-quiet" }, `${reply.tokens.length} tokens, ${(mean.reduce((a, b) => a + b, 0) / Math.max(1, mean.length)).toFixed(2)} of ${reply.n_loops} loops on average; ${Math.round(100 * reply.computed)}% of the layer passes were computed. A click goes on from a token.`),
      h("div", { class: "tlx-row tlx-tight" }, reply.tokens.map((id, i) => h("button", { class: "tlx-token", title: `${reply.loops[i]} loops`,
        "aria-label": `generated token ${visible(reply.words[id])}, ${reply.loops[i]} loops; pin it`,
        onclick: () => { this.set({ tokens: [...reply.prompt, ...reply.tokens], at: reply.prompt.length + i }); } },
        h("bdi", {}, visible(reply.words[id])), h("small", { style: `--share:${reply.loops[i] / reply.n_loops}` }, String(reply.loops[i]))))));
  }

  buildTaking() {
    const { controls: c, carrier } = this;
    c.script = h("textarea", { rows: 12, readonly: true, hidden: true, "aria-label": "the screen as Python", spellcheck: "false", class: "tlx-script" });
    const copied = async (text, what) => {
      try { await navigator.clipboard.writeText(text); c.status.textContent = `${what} copied.`; } catch { c.status.textContent = `${what} is below.`; }
    };
    const python = async () => {
      const reply = await this.ask({ ask: "script" });
      if (reply) { c.script.hidden = false; c.script.value = reply.script; await copied(reply.script, "The script"); }
    };
    const save = (blob, name) => { const a = h("a", { href: URL.createObjectURL(blob), download: name }); a.click(); setTimeout(() => URL.revokeObjectURL(a.href), 1000); };
    const page = async () => {
      const reply = await this.ask({ ask: "page" });
      if (reply) save(new Blob([reply.html], { type: "text/html" }), "explorer.html");
    };
    return this.panel("Take it with you", "taking", h("div", { class: "tlx-row" }, h("button", { onclick: python }, "Copy as Python"),
      carrier.link ? h("button", { onclick: () => { const link = carrier.link(this.kept()); c.script.hidden = false; c.script.value = link; copied(link, "The address"); } }, "Copy the address") : null,
      h("button", { onclick: () => save(new Blob([JSON.stringify({ state: this.kept(), ...this.reply.raw, sweep: this.sweepReply?.raw ?? null })], { type: "application/json" }), "explorer.json") }, "Save the numbers (JSON)"),
      h("button", { onclick: () => this.grid.picture().toBlob((blob) => save(blob, "explorer.png")) }, "Save the picture (PNG)"),
      h("button", { onclick: page }, "Save a page that works alone (HTML)"),
      h("button", { onclick: () => { this.adopt({}); this.set({}); } }, "Start over")), c.script);
  }

  // ---- asking

  typed(always) {
    const text = this.controls.prompt.value;
    if (text !== this.textShown || always) this.set(text === this.textShown ? {} : { prompt: text, tokens: null, at: null });
  }

  busy(share, what = "") {
    const c = this.controls;
    c.working.hidden = share === null;
    c.bar.value = share ?? 0;
    c.said.textContent = what;
    this.root.setAttribute("aria-busy", String(share !== null));
  }

  fail(sentence) {
    const c = this.controls;
    c.error.hidden = !sentence;
    c.error.textContent = sentence ?? "";
  }

  // The reply to a message about what is on the screen; null where it failed, which is said, or is no longer wanted.
  // A question ends an older one of its kind; a new grid ends them all, except those that do not depend on it.
  async ask(message) {
    const kind = message.ask;
    if (kind === "grid") { for (const [name, task] of this.tasks) if (!["token", "script", "page"].includes(name)) task.abort(); }
    else if (this.timer) await this.run(); // what was changed just now comes first
    this.tasks.get(kind)?.abort();
    const task = new AbortController();
    this.tasks.set(kind, task);
    const slow = setTimeout(() => this.tasks.get(kind) === task && this.busy(0, "working"), 200);
    const said = (share, what) => this.tasks.get(kind) === task && !this.controls.working.hidden && this.busy(share, what);
    let reply;
    try {
      reply = await this.carrier.ask({ ...message, state: this.state }, said, task.signal);
    } catch (error) {
      reply = { error: error.message || "The program that serves this page does not answer; is it still running?" };
    }
    clearTimeout(slow);
    if (this.tasks.get(kind) === task) this.tasks.delete(kind);
    if (!this.tasks.size) this.busy(null);
    if (task.signal.aborted || reply.cancelled) return null;
    this.fail(reply.error);
    return reply.error ? null : reply;
  }

  stop() {
    for (const task of this.tasks.values()) task.abort();
    this.tasks.clear();
    this.busy(null);
  }

  async run() {
    clearTimeout(this.timer);
    this.timer = null;
    const reply = await this.ask({ ask: "grid" });
    if (!reply) return;
    const read = (grid) => grid && { ...grid, ...Object.fromEntries(["top", "top_log_probs", "entropy", "kl", "log_probs", "ranks", "targets", "change"].map((name) => [name, unpacked(grid[name])])) };
    this.reply = { ...reply, raw: reply, grid: read(reply.grid), edited: read(reply.edited) };
    this.words = { ...reply.words, ...reply.grid.words, ...reply.edited?.words };
    if (this.state.at === null || this.state.at >= reply.tokens.length) this.state.at = reply.at;
    this.textShown = this.state.tokens ? reply.tokens.map((id) => reply.words[id]).join(this.about.has_tokenizer ? "" : ", ") : this.state.prompt;
    this.showControls();
    this.refresh();
    if (this.lookedAt !== this.state.at) this.grid.show(this.grid.cursor = this.pinnedCell());
    this.lookedAt = this.state.at;
    if (this.controls.attentionPanel?.open) this.askAttention();
  }

  async sweep() {
    const { controls: c, state } = this;
    const reply = await this.ask({ ask: "sweep", site: c.site.value, head: +c.siteHead.value, answer: state.answer, wrong: state.wrong });
    if (!reply) return;
    this.sweepReply = { ...reply, raw: reply, values: unpacked(reply.values), row: new Map(reply.rows.map((name, i) => [name, i])) };
    this.set({ colour: "sweep" }, { again: false });
  }

  async follow(text) {
    const { controls: c, state } = this;
    if (text === "") return;
    const reply = await this.ask({ ask: "token", tokens: [text] });
    if (!reply) return;
    c.pin.value = "";
    Object.assign(this.words ?? {}, reply.words);
    if (!state.pins.includes(reply.tokens[0])) this.set({ pins: [...state.pins, reply.tokens[0]].slice(-6) });
  }

  // ---- showing

  showControls() {
    const { controls: c, state, about } = this;
    const put = (control, value) => { if (control && document.activeElement !== control) control.value = value; };
    put(c.prompt, this.reply && state.tokens ? this.textShown : state.prompt);
    put(c.other, state.other);
    put(c.loops, Math.min(64, state.loops));
    put(c.loopsTyped, state.loops);
    put(c.answer, state.answer);
    put(c.wrong, state.wrong);
    c.lens.value = state.lens;
    c.fold.value = state.fold;
    c.core.checked = state.core;
    c.show.value = state.show;
    if (c.site && state.patch) { c.site.value = state.patch.site; put(c.siteHead, state.patch.head); }
    if (c.siteHead) c.siteHead.parentElement.hidden = c.site.value !== "z";
    this.showEdits();
  }

  // Which rows are shown of which grid.
  choose() {
    const { reply, state } = this;
    const edited = reply.edited && state.show !== "unedited" ? reply.edited : null;
    const grid = edited ?? reply.grid;
    const last = new Map();
    grid.rows.forEach((row) => last.set(row.where + row.stack, row.layer));
    const byName = new Map(reply.grid.rows.map((row, i) => [row.name, i]));
    const rows = grid.rows
      .map((row, index) => ({ ...row, index, twinIndex: byName.get(row.twin) ?? null, twinRow: reply.grid.rows[byName.get(row.twin)] }))
      .filter((row) => (!state.core || row.pass) && (reply.lens === "readout" || (last.get(row.where + row.stack) - row.layer) % state.fold === 0));
    return { grid, rows, difference: Boolean(edited && state.show === "difference") };
  }

  refresh() {
    const { reply, state, controls: c } = this;
    if (!reply) return;
    const view = (this.view = this.choose());
    const measure = measures(this.words);
    const pins = reply.pins;
    const names = ["prob", "entropy", "kl", "change", ...(pins.length ? pins : [0]).flatMap((_, i) => [`p:${i}`, `r:${i}`]), ...(this.sweepReply ? ["sweep"] : [])];
    if (!names.includes(state.colour)) state.colour = "prob";
    c.colour.replaceChildren(...names.map((name) => h("option", { value: name }, measure(name, pins).title)));
    c.colour.value = state.colour;
    c.showField.hidden = !reply.edited;
    c.foldField.hidden = c.coreField.hidden = reply.lens === "readout"; // which has a row for every loop
    c.pins.replaceChildren(...pins.map((id, i) => h("li", {}, h("span", { class: "tlx-dot", style: `background:${LINES[i % LINES.length]}` }), h("bdi", {}, visible(this.words[id])),
      !this.carrier.frozen && h("button", { "aria-label": `stop following ${visible(this.words[id])}`, onclick: () => this.set({ pins: state.pins.filter((_, k) => k !== i) }) }, "×"))));
    const cells = state.patch?.on !== false ? state.patch?.cells.length ?? 0 : 0;
    if (c.patched) c.patched.textContent = cells ? `${cells} patched` : "";

    const how = measure(state.colour, pins);
    const { grid, rows, difference } = view;
    const value = (row, col) => (state.colour === "sweep" ? this.sweepValue(row, col) : how.of(grid, row.index, col));
    const old = (row, col) => (row.twinIndex === null ? NaN : how.of(reply.grid, row.twinIndex, col));
    let most = how.fixed ?? 0;
    const all = [];
    for (const row of rows) for (let col = 0; col < reply.tokens.length; col++) {
      const v = difference ? Math.abs(value(row, col) - old(row, col)) : value(row, col);
      if (Number.isFinite(v)) all.push(v);
    }
    if (!how.fixed || difference) { all.sort((a, b) => a - b); most = (state.colour.startsWith("r:") ? all.at(-1) : all[Math.floor(0.99 * (all.length - 1))]) || 1; }
    const base = backOf(this.root);
    const strength = (v) => (difference || !how.share ? Math.abs(v) / most : how.share(v, most));
    const fill = (v) => (Number.isFinite(v) ? mix(base, v < 0 ? HUES.red : HUES[difference ? "blue" : how.hue], 0.9 * clamp(strength(v), 0, 1)) : null);
    const patched = new Set((state.patch?.on !== false ? state.patch?.cells ?? [] : []).map(String));
    const text = (g, r, col) => visible(this.words[g.top.at(r, col)] ?? String(g.top.at(r, col)));

    this.grid.pinned = this.pinnedCell();
    this.grid.set({
      rows: rows.map((row) => ({ name: reply.lens === "readout" ? row.where : `${row.where} · ${row.layer}`, group: row.where + row.stack, edge: !row.pass, mark: row.beyond })),
      columns: reply.tokens.map((id, i) => ({ name: visible(reply.words[id]), sub: String(i) })),
      cell: (r, col) => {
        const row = rows[r];
        const has = row.twinRow ?? row;
        const corner = patched.size > 0 && (patched.has(String([has.name, col])) || patched.has(String([has.pass, col])));
        const now = (this.carrier.wrong?.has(String([row.index, col])) ? "✗ " : "") + text(grid, row.index, col);
        const before = row.twinIndex === null || !reply.edited ? now : text(reply.grid, row.twinIndex, col);
        if (!difference) return { text: now, fill: fill(value(row, col)), corner, outline: grid === reply.edited && now !== before };
        return { text: now === before ? now : `${before}→${now}`, fill: fill(value(row, col) - old(row, col)), corner, outline: now !== before, dim: now === before };
      },
    }, { cw: this.host.clientWidth < 600 ? 58 : 72, left: this.host.clientWidth < 600 ? 92 : 116 });
    this.showLegend(how, most, difference, base);
    this.showCell();
    this.showCurves();
  }

  sweepValue(row, col) {
    const { sweepReply: s } = this;
    const has = row.twinRow ?? row;
    const at = s.row.get(s.site === "state" ? has.pass : has.name);
    return at === undefined ? NaN : s.values.at(at, col);
  }

  pinnedCell() {
    const { rows } = this.view;
    if (!rows.length) return null;
    const found = rows.findIndex((row) => row.name === this.state.row);
    return [found < 0 ? rows.length - 1 : found, this.state.at];
  }

  showLegend(how, most, difference, base) {
    const { controls: c, about, reply } = this;
    const ends = difference || this.state.colour === "sweep" ? [HUES.red, base, HUES.blue] : [base, HUES[how.hue]];
    const low = difference || this.state.colour === "sweep" ? `−${shown(most)}` : how.share ? String(most) : "0";
    const high = how.share && !difference ? "0" : shown(most);
    const notes = [
      this.view.rows.some((row) => row.beyond) && `› loops beyond the ${about.made_for} that the model was made for`,
      reply.edited && this.state.show !== "unedited" && "framed: another answer than in the unedited run",
      this.state.patch?.cells?.length && "corner: patched",
    ].filter(Boolean);
    c.legend.replaceChildren(h("span", {}, (difference ? "edited − unedited: " : "") + how.title), h("span", {}, low),
      h("span", { class: "tlx-ramp", style: `background:linear-gradient(90deg,${ends.map(css).join(",")})` }), h("span", {}, high), ...notes.map((note) => h("span", { class: "tlx-quiet" }, note)));
  }

  pick(cell) {
    if (this.tool === "patch") return this.patch(cell, cell);
    const moved = this.state.at !== cell[1];
    this.lookedAt = cell[1];
    this.set({ row: this.view.rows[cell[0]].name, at: cell[1] }, { again: false });
    if (moved && this.controls.attentionPanel?.open) this.askAttention();
  }

  inWords(r, col) {
    const { reply, view } = this;
    const row = view.rows[r];
    const top = view.grid.top.at(row.index, col);
    return `${this.rowName(row)}, position ${col} ‘${visible(reply.words[reply.tokens[col]])}’: ‘${visible(this.words[top])}’ ${shown(Math.exp(view.grid.top_log_probs.at(row.index, col)))}`;
  }

  rowName(row) {
    return this.reply.lens === "readout" ? row.where : `${row.where}, layer ${row.layer}`;
  }

  // The most probable tokens of a cell and its numbers.
  facts(r, col, withButtons) {
    const { reply, view, state } = this;
    const { grid, rows } = view;
    const row = rows[r];
    const k = grid.top.shape[2];
    const line = (name, value) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value));
    const list = Array.from({ length: k }, (_, i) => {
      const id = grid.top.at(row.index, col, i);
      const p = Math.exp(grid.top_log_probs.at(row.index, col, i));
      const word = h("bdi", {}, visible(this.words[id]));
      const name = withButtons && !this.carrier.frozen ? h("button", { class: "tlx-plain", title: "follow this token", "aria-label": `follow ${visible(this.words[id])}`,
        onclick: () => state.pins.includes(id) || this.set({ pins: [...state.pins, id].slice(-6) }) }, word) : word;
      return h("tr", {}, h("td", {}, name), h("td", { class: "tlx-p" }, h("span", { style: `width:${(100 * p).toFixed(1)}%` }), shown(p)));
    });
    const followed = Array.from({ length: grid.log_probs.shape[2] }, (_, t) => {
      const who = reply.pins.length ? `‘${visible(this.words[reply.pins[t]])}’` : `final answer ‘${visible(this.words[grid.targets.at(col, t)])}’`;
      return line(who, `${shown(Math.exp(grid.log_probs.at(row.index, col, t)))}, rank ${grid.ranks.at(row.index, col, t)}`);
    });
    const effect = this.sweepReply ? line("effect of a patch here", shown(this.sweepValue(row, col))) : null;
    return [
      h("h3", {}, `${this.rowName(row)} `, h("span", { class: "tlx-quiet" }, `after ${col} ‘`, h("bdi", {}, visible(reply.words[reply.tokens[col]])), "’")),
      row.beyond ? h("p", { class: "tlx-quiet" }, `beyond the ${this.about.made_for} loops it was made for`) : null,
      h("table", { class: "tlx-top" }, h("tbody", {}, list)),
      h("table", { class: "tlx-facts" }, h("tbody", {}, followed, line("entropy", `${shown(grid.entropy.at(row.index, col))} nats`), line("KL to the last row", `${shown(grid.kl.at(row.index, col))} nats`),
        line("change since the loop before", shown(grid.change.at(row.index, col))), effect)),
    ].filter(Boolean);
  }

  showCell() {
    const cell = this.pinnedCell();
    this.controls.cell.replaceChildren(...(cell ? this.facts(cell[0], cell[1], true) : []));
  }

  tip(cell, event) {
    const { tip } = this.controls;
    tip.hidden = !cell || event.pointerType !== "mouse" || Boolean(this.grid.held);
    if (tip.hidden || !this.view) return;
    if (String(cell) !== this.tipOf) tip.replaceChildren(...this.facts(...cell, false));
    this.tipOf = String(cell);
    const [w, high] = [tip.offsetWidth, tip.offsetHeight];
    const x = event.clientX + 18 + w < innerWidth ? event.clientX + 18 : event.clientX - w - 12;
    Object.assign(tip.style, { left: `${Math.max(4, x)}px`, top: `${clamp(event.clientY + 14, 4, Math.max(4, innerHeight - high - 4))}px` });
  }

  // Lines of the followed tokens over all virtual layers, at the pinned position.
  showCurves() {
    const { reply, state, view, controls: c } = this;
    const { grid } = view;
    const rows = grid.rows, n = rows.length;
    const [w, high, left, bottom] = [Math.max(260, Math.min(760, c.curves.clientWidth || 420)), 170, 34, 22];
    const isRank = state.curve === "rank";
    const lines = Array.from({ length: grid.log_probs.shape[2] }, (_, t) => rows.map((_, r) => (isRank ? grid.ranks.at(r, state.at, t) : Math.exp(grid.log_probs.at(r, state.at, t)))));
    const most = Math.max(1, ...lines.flat());
    const x = (r) => left + (n < 2 ? 0 : ((w - left - 6) * r) / (n - 1));
    const y = (v) => (isRank ? 8 + ((high - bottom - 12) * Math.log10(v + 1)) / Math.log10(most + 1.01) : high - bottom - 4 - (high - bottom - 12) * v);
    const ticks = isRank ? [0, 1, 10, 100, 1000, 10000, 100000].filter((v) => v <= most) : [0, 0.5, 1];
    const marks = [];
    let free = 0;
    rows.forEach((row, r) => {
      if (r && row.where === rows[r - 1].where && row.stack === rows[r - 1].stack) return;
      if (r) marks.push(h("line", { x1: (x(r) + x(r - 1)) / 2, x2: (x(r) + x(r - 1)) / 2, y1: 4, y2: high - bottom, class: row.pass && rows[r - 1].pass ? "tlx-tick" : "tlx-edge" }));
      const name = row.where.replace(/^loop /, "");
      if (x(r) >= free && x(r) + 6 * name.length < w + 4) { marks.push(h("text", { x: x(r), y: high - 6 }, name)); free = x(r) + 7 * name.length + 6; }
    });
    const at = this.pinnedCell();
    if (at && view.rows[at[0]]) marks.push(h("line", { x1: x(view.rows[at[0]].index), x2: x(view.rows[at[0]].index), y1: 4, y2: high - bottom, class: "tlx-here" }));
    const who = (t) => (reply.pins.length ? visible(this.words[reply.pins[t]]) : visible(this.words[grid.targets.at(state.at, t)]));
    const toggle = h("button", { onclick: () => this.set({ curve: isRank ? "prob" : "rank" }, { again: false }) }, isRank ? "show probability" : "show rank");
    const title = `${isRank ? "Rank" : "Probability"} of ${reply.pins.length ? "the followed tokens" : "the final answer"} at position ${state.at}`;
    c.curves.replaceChildren(h("h3", {}, title, " ", toggle),
      h("svg", { viewBox: `0 0 ${w} ${high}`, width: w, height: high, role: "img", "aria-label": `${title}, over ${n} ${reply.lens === "readout" ? "loops" : "virtual layers"}` },
        ticks.map((v) => [h("line", { x1: left, x2: w - 6, y1: y(v), y2: y(v), class: "tlx-tick" }), h("text", { x: 2, y: y(v) + 4 }, String(v))]).flat(), marks,
        lines.map((line, t) => h("path", { d: line.map((v, r) => `${r ? "L" : "M"}${x(r).toFixed(1)} ${y(v).toFixed(1)}`).join(""), fill: "none", stroke: LINES[t % LINES.length], "stroke-width": 2, "stroke-dasharray": DASHES[t % DASHES.length] }))),
      h("ul", { class: "tlx-chips" }, lines.map((line, t) => h("li", {}, h("span", { class: "tlx-dot", style: `background:${LINES[t % LINES.length]}` }), h("bdi", {}, who(t)), ` ${isRank ? line.at(-1) : shown(line.at(-1))}`))));
  }
}

// What anywidget asks of a module.
export default {
  render({ model, el }) {
    return mount(el, overWidget(model));
  },
};
