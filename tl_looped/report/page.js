// Draws the figures of the page: of plotly's own script, 5 MB, they need heat maps, lines, points, bars and error bars.
// Colours of text and lines are those of the style sheet, so that figures follow the page's theme by themselves.
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
const DASHES = { dot: "2 3", dash: "6 4", dashdot: "6 3 2 3" };
const ruler = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip-box";

// Plotly's texts are markup: entities, <br> and <extra>.
const plain = (text) => String(text ?? "").replace(/<extra>.*?<\/extra>/g, "").replace(/<br>/g, "\n")
  .replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&quot;/g, '"').replace(/&#x27;/g, "'").replace(/&amp;/g, "&");

function number(value, format = ".4g") {
  if (typeof value !== "number") return plain(value);
  const [, digits, kind] = /\.?(\d*)([%g]?)$/.exec(format) ?? [];
  if (kind === "%") return `${(100 * value).toFixed(Number(digits || 0))} %`.replace("-", "−");
  return String(Number(value.toPrecision(Number(digits || 4)))).replace("-", "−");
}

const filled = (template, values) =>
  plain(template.replace(/%\{(\w+)(?::([^}]*))?\}/g, (_, name, format) => number(values[name], format)));

function put(parent, tag, attributes = {}, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}

function width(text, size = 12) {
  ruler.font = `${size}px system-ui, sans-serif`;
  return ruler.measureText(text).width;
}

// A colour scale as 256 colours.
function colours(scale) {
  Object.assign(ruler.canvas, { width: 256, height: 1 });
  const ramp = ruler.createLinearGradient(0, 0, 256, 0);
  for (const [at, colour] of scale) ramp.addColorStop(at, colour);
  ruler.fillStyle = ramp;
  ruler.fillRect(0, 0, 256, 1);
  const { data } = ruler.getImageData(0, 0, 256, 1);
  return (share) => data.slice(4 * Math.round(255 * Math.min(1, Math.max(0, share))), 4 * Math.round(255 * Math.min(1, Math.max(0, share))) + 3);
}

const finite = (values) => values.filter((v) => typeof v === "number" && Number.isFinite(v));

// The place of a value along an axis as a number; names are numbered in their order.
function measure(axis, traces, key) {
  axis.names = [...new Set(traces.flatMap((t) => t[key]).filter((v) => typeof v === "string"))];
  axis.at = (v) => (typeof v === "string" ? axis.names.indexOf(v) : axis.type === "log" ? (v > 0 ? Math.log10(v) : NaN) : v ?? NaN);
  const points = traces.flatMap((t) => {
    const spread = key === "y" && t.error_y ? t.error_y.array : null;
    const ends = spread ? t.y.flatMap((v, i) => [v - spread[i], v + spread[i]]) : t[key];
    return t.type === "bar" && key === "y" ? [...ends, 0] : ends;
  });
  const known = finite(points.map(axis.at));
  let [low, high] = axis.range ?? (known.length ? [Math.min(...known), Math.max(...known)] : [0, 1]);
  const heat = traces.some((t) => t.type === "heatmap"), bars = key === "x" && traces.some((t) => t.type === "bar");
  const room = axis.range ? 0 : heat || bars ? 0.5 : 0.05 * (high - low || Math.abs(high) || 1);
  [axis.low, axis.high] = [low - room, high + room];
  if (axis.autorange === "reversed") [axis.low, axis.high] = [axis.high, axis.low];
}

function ticks(axis, length, each) {
  const [low, high] = [Math.min(axis.low, axis.high), Math.max(axis.low, axis.high)];
  const inside = (v) => axis.at(v) >= low - 1e-9 && axis.at(v) <= high + 1e-9;
  const said = (v) => number(v, axis.tickformat?.includes("%") ? axis.tickformat : ".6g");
  if (axis.tickvals) return axis.tickvals.map((v, i) => [axis.at(v), plain(axis.ticktext?.[i] ?? v)]).filter(([v]) => v >= low && v <= high);
  if (axis.names.length) return axis.names.map((name, i) => [i, plain(name)]);
  const most = Math.max(2, length / each);
  if (axis.type === "log") {
    const found = [];
    const steps = high - low < 1 ? [1, 2, 3, 4, 5, 6, 7, 8, 9] : high - low < 2 ? [1, 2, 5] : [1], jump = Math.ceil((high - low) / most);
    for (let p = Math.floor(low); p <= high; p++) {
      if (steps.length === 1 && p % jump) continue;
      for (const s of steps) if (inside(s * 10 ** p)) found.push([Math.log10(s * 10 ** p), Math.abs(p) < 4 ? said(s * 10 ** p) : `${s > 1 ? s + "·" : ""}10${[...String(p)].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("")}`]);
    }
    return found;
  }
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(axis.dtick === 1 ? 1 : 0, [1, 2, 5, 10].map((s) => s * power).find((s) => s >= raw * 0.999));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9; i++) found.push([i * step, said(Number((i * step).toPrecision(12)))]);
  return found;
}

function key(place, traces, layout, redraw) {
  const scaled = traces.find((t) => t.type === "heatmap" ? t.showscale !== false : t.marker?.showscale);
  const box = place.querySelector(".key");
  box.replaceChildren();
  const add = (tag, text, name = "") => Object.assign(box.appendChild(document.createElement(tag)), { textContent: text, className: name });
  if (scaled) {
    const part = scaled.type === "heatmap" ? scaled : scaled.marker;
    const [low, high] = scaled.limits;
    add("span", plain((part.colorbar?.title?.text ?? part.colorbar?.title) || ""));
    add("span", number(low, ".3g"));
    add("i", "").style.background = `linear-gradient(90deg, ${part.colorscale.map(([at, colour]) => `${colour} ${100 * at}%`).join(", ")})`;
    add("span", number(high, ".3g"));
  }
  const named = traces.filter((t) => t.type !== "heatmap" && t.name && t.showlegend !== false);
  if (layout.showlegend === false || !named.length || (traces.length < 2 && !named[0].showlegend)) return;
  for (const trace of named) {
    const button = add("button", plain(trace.name), trace.hidden ? "off" : "");
    button.style.setProperty("--colour", trace.colour);
    button.setAttribute("aria-pressed", String(!trace.hidden));
    button.title = "show or hide";
    button.onclick = () => { trace.hidden = !trace.hidden; redraw(); };
  }
}

function draw(place) {
  const { traces, layout } = place.figure;
  key(place, traces, layout, () => draw(place));
  const svg = place.querySelector("svg");
  svg.replaceChildren();
  const full = Math.max(250, place.clientWidth), height = layout.height;
  svg.setAttribute("width", full);
  const shown = traces.filter((t) => !t.hidden);
  const axes = {};
  for (const name of Object.keys(layout).filter((k) => /^[xy]axis\d*$/.test(k))) axes[name.replace("axis", "")] = { ...layout[name] };
  for (const [name, axis] of Object.entries(axes)) {
    const mine = shown.filter((t) => (t[name[0] + "axis"] ?? name[0]) === name || (axis.matches && (t[name[0] + "axis"] ?? name[0]) === axis.matches));
    measure(axis, mine.length ? mine : traces, name[0]);
  }
  const rows = Object.keys(axes).filter((name) => name[0] === "y").map((name) => ({ y: axes[name], x: axes[(axes[name].anchor ?? "x")] ?? axes.x, name }));

  // Room for labels: as wide as the longest, thinned out where they would touch.
  const title = (axis) => plain(axis.title?.text);
  const across = axes[Object.keys(axes).filter((name) => name[0] === "x").pop()];
  const yTicks = rows.map(({ y }) => ticks(y, height * ((y.domain?.[1] ?? 1) - (y.domain?.[0] ?? 0)), 40));
  const left = Math.min(full * 0.45, Math.max(24, ...yTicks.flat().map(([, text]) => width(text) + 10)) + (rows.some(({ y }) => title(y)) ? 20 : 0));
  const notes = layout.annotations ?? [];
  const plot = { left, right: full - 12, top: notes.length ? 34 : 22, bottom: height };
  const xTicks = ticks(across, plot.right - left, 60);
  const longest = Math.max(0, ...xTicks.map(([, text]) => width(text)));
  const perUnit = (plot.right - left) / Math.abs(across.high - across.low || 1);
  const between = xTicks.length > 1 ? Math.abs(xTicks[1][0] - xTicks[0][0]) * perUnit : Infinity;
  const tilted = longest + 8 > between && (across.tickvals || across.names.length) && longest > 22;
  const every = Math.max(1, Math.ceil((tilted ? 13 : longest + 8) / between));
  const labels = 8 + (tilted ? longest * 0.87 + 8 : 14), onTop = across.side === "top";
  plot[onTop ? "top" : "bottom"] += onTop ? labels - 14 : -labels;
  plot.bottom -= title(across) ? 20 : 4;
  if (!onTop && !notes.length) plot.top = 8;

  const scale = (axis, from, to) => { axis.px = (v) => from + ((axis.at(v) - axis.low) / (axis.high - axis.low)) * (to - from); axis.back = (p) => axis.low + ((p - from) / (to - from)) * (axis.high - axis.low); [axis.from, axis.to] = [from, to]; };
  const deep = plot.bottom - plot.top;
  for (const [name, axis] of Object.entries(axes)) {
    const [begin, end] = axis.domain ?? [0, 1];
    if (name[0] === "x") scale(axis, plot.left, plot.right);
    else scale(axis, plot.bottom - begin * deep, plot.bottom - end * deep);
  }

  rows.forEach(({ y, x }, i) => {
    const group = put(svg, "g", { class: "axis" });
    put(group, "path", { class: "frame", d: `M${x.from} ${y.to}V${y.from}H${x.to}` });
    for (const [v, text] of yTicks[i]) {
      const at = y.from + ((v - y.low) / (y.high - y.low)) * (y.to - y.from);
      if (y.showgrid !== false) put(group, "path", { class: "rule", d: `M${x.from} ${at}H${x.to}` });
      put(group, "text", { class: "tick", x: x.from - 6, y: at + 4, "text-anchor": "end" }, text);
    }
    if (title(y)) put(group, "text", { class: "axis-name", transform: `translate(12 ${(y.from + y.to) / 2}) rotate(-90)`, "text-anchor": "middle" }, title(y));
    const last = x === across;
    ticks(x, x.to - x.from, 60).forEach(([v, text], k) => {
      if (k % every) return;
      const at = x.from + ((v - x.low) / (x.high - x.low)) * (x.to - x.from), edge = onTop ? y.to : y.from;
      if (x.showgrid !== false) put(group, "path", { class: "rule", d: `M${at} ${y.from}V${y.to}` });
      if (!last || x.showticklabels === false) return;
      const place = tilted ? { transform: `translate(${at + (onTop ? 2 : 4)} ${edge + (onTop ? -5 : 14)}) rotate(-60)`, "text-anchor": onTop ? "start" : "end" } : { x: at, y: edge + (onTop ? -6 : 16), "text-anchor": "middle" };
      put(group, "text", { class: "tick", ...place }, text);
    });
    if (last && title(x)) put(group, "text", { class: "axis-name", x: (x.from + x.to) / 2, y: height - 6, "text-anchor": "middle" }, title(x));
  });

  place.points = [];
  for (const trace of shown) {
    const x = axes[trace.xaxis ?? "x"], y = axes[trace.yaxis ?? "y"];
    (trace.type === "heatmap" ? drawCells : drawLine)(svg, trace, x, y, place.points);
  }

  // "x" is the data's, "x domain" a share of the panel, "paper" a share of the figure.
  const point = (ref, v, side) => {
    if (ref === "paper") return side === "x" ? plot.left + v * (plot.right - plot.left) : plot.bottom - v * deep;
    const axis = axes[(ref ?? side).split(" ")[0]];
    return /domain/.test(ref ?? "") ? axis.from + v * (axis.to - axis.from) : axis.px(v);
  };
  for (const s of layout.shapes ?? []) {
    const [x0, x1] = [s.x0, s.x1].map((v) => point(s.xref, v, "x")), [y0, y1] = [s.y0, s.y1].map((v) => point(s.yref, v, "y"));
    put(svg, "path", { d: s.type === "rect" ? `M${x0} ${y0}H${x1}V${y1}H${x0}Z` : `M${x0} ${y0}L${x1} ${y1}`, fill: "none", stroke: s.line?.color ?? "#777", "stroke-width": s.line?.width ?? 1, "stroke-dasharray": DASHES[s.line?.dash] ?? "none" });
  }
  // A note that would run into the one beside it stands above it.
  let end = -Infinity, raised = 0, line = NaN;
  for (const note of notes) {
    const isFirst = note.xref?.includes("domain") && note.x === 0;
    const [x, y, text] = [point(note.xref, note.x, "x"), point(note.yref, note.y, "y") - 4, plain(note.text)];
    const half = width(text, 11) / 2;
    raised = y === line && x - half < end + 4 && !raised ? 13 : 0;
    [end, line] = [x + half, y];
    const size = Math.min(12, (12 * (full - (isFirst ? x : 0))) / width(text));
    put(svg, "text", { class: "tick", x, y: y - raised, "text-anchor": isFirst ? "start" : "middle", style: `font-size: ${size}px` }, text);
  }
  place.mark = put(svg, "path", { class: "pointed" });
}

function drawCells(svg, trace, x, y, points) {
  const group = put(svg, "g", { class: "cells" });
  const { z } = trace, rows = z.length, columns = z[0].length, colour = colours(trace.colorscale);
  const [low, high] = trace.limits, share = (v) => (high > low ? (v - low) / (high - low) : 0.5);
  const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  const [flipX, flipY] = [x.px(1) < x.px(0), y.px(1) < y.px(0)];
  z.forEach((row, i) => row.forEach((v, j) => {
    if (v === null) return;
    const at = 4 * ((flipY ? rows - 1 - i : i) * columns + (flipX ? columns - 1 - j : j));
    image.data.set([...colour(share(v)), 255], at);
  }));
  context.putImageData(image, 0, 0);
  const [left, top] = [Math.min(x.from, x.to), Math.min(y.from, y.to)], [wide, high_] = [Math.abs(x.to - x.from), Math.abs(y.to - y.from)];
  put(group, "image", { href: canvas.toDataURL(), x: left, y: top, width: wide, height: high_, preserveAspectRatio: "none", style: "image-rendering: pixelated" });
  if (trace.xgap && wide / columns > 4) for (let j = 1; j < columns; j++) put(group, "path", { class: "gap", d: `M${left + (j * wide) / columns} ${top}v${high_}` });
  if (trace.ygap && high_ / rows > 4) for (let i = 1; i < rows; i++) put(group, "path", { class: "gap", d: `M${left} ${top + (i * high_) / rows}h${wide}` });
  const size = trace.textfont?.size ?? 11;
  if (trace.texttemplate) z.forEach((row, i) => row.forEach((v, j) => {
    const [r, g, b] = colour(share(v)), dark = 0.3 * r + 0.59 * g + 0.11 * b < 140;
    put(group, "text", { x: x.px(trace.x?.[j] ?? j), y: y.px(trace.y?.[i] ?? i) + size * 0.35, "text-anchor": "middle", "font-size": size, fill: dark ? "#fff" : "#111" }, plain(trace.text[i][j]));
  }));
  points.push({ inside: (px, py) => px >= left && px <= left + wide && py >= top && py <= top + high_, find: (px, py) => {
    const j = Math.min(columns - 1, Math.floor(((px - left) / wide) * columns)), i = Math.min(rows - 1, Math.floor(((py - top) / high_) * rows));
    const [r, c] = [flipY ? rows - 1 - i : i, flipX ? columns - 1 - j : j];
    const values = { x: trace.x?.[c] ?? c, y: trace.y?.[r] ?? r, z: z[r][c], text: trace.text?.[r]?.[c], hovertext: trace.hovertext?.[r]?.[c], customdata: trace.customdata?.[r]?.[c] };
    const text = z[r][c] === null ? "" : filled(trace.hovertemplate ?? "%{x}, %{y}: %{z}", values);
    return { far: 0, text, d: `M${left + (j * wide) / columns} ${top + (i * high_) / rows}h${wide / columns}v${high_ / rows}h${-wide / columns}z` };
  } });
}

function drawLine(svg, trace, x, y, points) {
  const group = put(svg, "g", { class: "line" }), mode = trace.mode ?? "lines+markers";
  const at = trace.y.map((v, i) => [x.px(trace.x?.[i] ?? i), y.px(v), i]).filter(([px, py]) => Number.isFinite(px) && Number.isFinite(py));
  const shade = Array.isArray(trace.marker?.color) ? colours(trace.marker.colorscale) : null;
  const [low, high] = trace.limits ?? [0, 1];
  const colour = (i) => (shade ? `rgb(${[...shade((trace.marker.color[i] - low) / (high - low || 1))].join()})` : trace.colour);
  if (trace.type === "bar") {
    const half = 0.4 * Math.abs(x.px(1) - x.px(0)), base = y.px(Math.max(0, y.low));
    for (const [px, py, i] of at) put(group, "rect", { class: "bar", x: px - half, y: Math.min(py, base), width: 2 * half, height: Math.max(1, Math.abs(py - base)), fill: colour(i) });
  } else {
    // A value that is missing leaves a gap.
    const path = at.map(([px, py, i], k) => `${k && at[k - 1][2] === i - 1 ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
    if (mode.includes("lines")) put(group, "path", { class: "stroke", d: path, stroke: trace.line?.color ?? trace.colour, "stroke-width": trace.line?.width ?? 2, "stroke-dasharray": DASHES[trace.line?.dash] ?? "none" });
    for (const [px, , i] of trace.error_y ? at : []) {
      const e = trace.error_y.array[i];
      if (e) put(group, "path", { class: "stroke", d: `M${px} ${y.px(trace.y[i] - e)}V${y.px(trace.y[i] + e)}`, stroke: trace.colour, "stroke-width": 1.2 });
    }
    if (mode.includes("markers")) for (const [px, py, i] of at) put(group, "circle", { cx: px.toFixed(1), cy: py.toFixed(1), r: (trace.marker?.size ?? 6) / 2, fill: colour(i) });
  }
  const say = (i) => {
    const text = Array.isArray(trace.text) ? trace.text[i] : trace.text;
    const values = { x: trace.x?.[i] ?? i, y: trace.y[i], text };
    if (trace.hovertemplate) return filled(trace.hovertemplate, values);
    const spread = trace.error_y ? ` ± ${number(trace.error_y.array[i], ".3g")}` : "";
    const along = typeof values.x === "string" ? plain(values.x) : `${plain(x.title?.text ?? "x")} ${number(values.x)}`;
    return [plain(trace.name), plain(text ?? ""), `${along}: ${number(values.y)}${spread}`].filter(Boolean).join("\n");
  };
  points.push({ inside: (_, py) => py >= Math.min(y.from, y.to) - 12 && py <= Math.max(y.from, y.to) + 12, find: (px, py) => {
    let best = null;
    for (const [cx, cy, i] of at) {
      const far = Math.hypot(cx - px, cy - py);
      if (!best || far < best.far) best = { far, i, d: `M${cx - 6} ${cy}a6 6 0 1 0 12 0a6 6 0 1 0 -12 0` };
    }
    return best && best.far < 40 ? { ...best, text: say(best.i) } : null;
  } });
}

function point(event) {
  const place = event.currentTarget, box = place.querySelector("svg").getBoundingClientRect();
  const [px, py] = [event.clientX - box.left, event.clientY - box.top];
  const found = place.points.filter((p) => p.inside(px, py)).map((p) => p.find(px, py)).filter((p) => p?.text).sort((a, b) => a.far - b.far)[0];
  tip.style.display = found ? "block" : "none";
  place.mark?.setAttribute("d", found?.d ?? "");
  if (!found) return;
  tip.textContent = found.text;
  const room = innerWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(room, event.clientX + 14))}px`;
  tip.style.top = `${event.clientY - tip.offsetHeight - 12 > 0 ? event.clientY - tip.offsetHeight - 12 : event.clientY + 18}px`;
}

const places = [...document.querySelectorAll(".drawing")];
for (const place of places) {
  const { data: traces, layout } = JSON.parse(place.querySelector("script").textContent);
  traces.forEach((t, i) => {
    t.colour = t.line?.color ?? (typeof t.marker?.color === "string" ? t.marker.color : null) ?? COLOURS[i % COLOURS.length];
    const values = t.type === "heatmap" ? finite(t.z.flat()) : Array.isArray(t.marker?.color) ? finite(t.marker.color) : [0, 1];
    t.limits = [t.zmin ?? t.marker?.cmin ?? Math.min(...values), t.zmax ?? t.marker?.cmax ?? Math.max(...values)];
  });
  place.figure = { traces, layout };
  const svg = put(place, "svg", { height: layout.height, role: "img", "aria-label": place.closest("figure").querySelector("figcaption").textContent });
  place.insertBefore(Object.assign(document.createElement("div"), { className: "key" }), svg);
  place.addEventListener("pointermove", point);
  place.addEventListener("pointerdown", point);
  place.addEventListener("pointerleave", () => { tip.style.display = "none"; place.mark?.setAttribute("d", ""); });
  let wide = 0;
  new ResizeObserver(() => { if (place.clientWidth !== wide) { wide = place.clientWidth; draw(place); } }).observe(place);
  draw(place);
}
// What is wider than the page fades at its right edge as long as there is more.
for (const wide of document.querySelectorAll(".scroll")) {
  const look = () => wide.classList.toggle("more", wide.scrollLeft + wide.clientWidth < wide.scrollWidth - 2);
  wide.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(wide);
}
addEventListener("scroll", () => { tip.style.display = "none"; }, { passive: true });
document.documentElement.dataset.drawn = places.length;
