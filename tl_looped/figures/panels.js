// Draws panels (`tl_looped.panels`) as SVG: heat maps, lines with error bars, bars, trajectories; several below one another.
// Colours of text and lines are those of the style sheet, so that figures follow the page's theme by themselves.
const SVG = "http://www.w3.org/2000/svg";
const COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"];
const DASHES = { dot: "2 3", dash: "6 4" };
const PALETTES = {
  Blues: "f7fbff deebf7 c6dbef 9ecae1 6baed6 4292c6 2171b5 08519c 08306b",
  Oranges: "fff5eb fee6ce fdd0a2 fdae6b fd8d3c f16913 d94801 a63603 7f2704",
  Purples: "fcfbfd efedf5 dadaeb bcbddc 9e9ac8 807dba 6a51a3 54278f 3f007d",
  RdBu: "67001f b2182b d6604d f4a582 fddbc7 f7f7f7 d1e5f0 92c5de 4393c3 2166ac 053061",
  Viridis: "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725",
};
const ruler = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip-box";

function stops(palette) {
  const colours = PALETTES[palette.replace("_r", "")].split(" ").map((colour) => `#${colour}`);
  return palette.endsWith("_r") ? colours.reverse() : colours;
}
const isCells = (panel) => panel.kind === "heat map" || panel.kind === "floorplan";
const finite = (values) => values.filter((v) => typeof v === "number" && Number.isFinite(v));
const span = (values) => (values.length ? [Math.min(...values), Math.max(...values)] : [0, 1]);
const placesOf = (axis) => (axis.said.length ? axis.said : axis.labels.map((label) => `${axis.title} ${label}`));

function number(value, axis, digits = 4) {
  if (axis?.form === "%") return `${Number((100 * value).toPrecision(digits))} %`.replace("-", "−");
  return String(Number(value.toPrecision(digits))).replace("-", "−");
}

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

// A palette as a function from 0..1 to red, green and blue.
function colours(palette) {
  Object.assign(ruler.canvas, { width: 256, height: 1 });
  const ramp = ruler.createLinearGradient(0, 0, 256, 0);
  stops(palette).forEach((colour, i, all) => ramp.addColorStop(i / (all.length - 1), colour));
  ruler.fillStyle = ramp;
  ruler.fillRect(0, 0, 256, 1);
  const { data } = ruler.getImageData(0, 0, 256, 1);
  return (share) => {
    const at = 4 * Math.round(255 * Math.min(1, Math.max(0, share)));
    return data.slice(at, at + 3);
  };
}

// The place of a value along an axis as a number, and the ends of the axis.
function measure(panels, role) {
  const axis = { ...panels[0].roles[role] };
  axis.at = (v) => (axis.scale === "rank" ? Math.log10(v + 1) : axis.scale === "log" ? (v > 0 ? Math.log10(v) : NaN) : v ?? NaN);
  const lines = panels.flatMap((panel) => (isCells(panel) ? [] : panel.grids.filter((line) => !line.hidden)));
  const values = lines.flatMap((line) => (line[role] ?? []).flatMap((v, i) => (role === "y" && line.band ? [v - line.band[i], v + line.band[i]] : [v])));
  if (role === "y" && panels[0].kind === "bars") values.push(0);
  let [low, high] = axis.range ?? span(finite(values.map(axis.at)));
  if (axis.labels.length) [low, high] = [0, axis.labels.length - 1];
  const room = axis.labels.length ? 0.5 : axis.range ? 0 : 0.05 * (high - low || Math.abs(high) || 1);
  [axis.low, axis.high] = [low - room, high + room];
  if (axis.scale === "rank" || (role === "y" && isCells(panels[0]))) [axis.low, axis.high] = [axis.high, axis.low];
  return axis;
}

function ticks(axis, length, each) {
  const [low, high] = [Math.min(axis.low, axis.high), Math.max(axis.low, axis.high)];
  const inside = ([v]) => v >= low - 1e-9 && v <= high + 1e-9, most = Math.max(2, length / each);
  if (axis.labels.length) return axis.labels.map((label, i) => [i, label]).filter(([, label]) => label);
  if (axis.scale === "rank") return [0, 1, 10, 100, 1e3, 1e4, 1e5].map((v) => [axis.at(v), String(v)]).filter(inside);
  if (axis.scale === "log") {
    const found = [], jump = Math.ceil((high - low) / most);
    const steps = high - low < 1 ? [1, 2, 3, 4, 5, 6, 7, 8, 9] : high - low < 2 ? [1, 2, 5] : [1];
    const power = (p) => [...String(p)].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("");
    for (let p = Math.floor(low); p <= high; p++) {
      if (steps.length === 1 && p % jump) continue;
      for (const s of steps) found.push([Math.log10(s * 10 ** p), Math.abs(p) < 4 ? number(s * 10 ** p, axis, 6) : `${s > 1 ? `${s}·` : ""}10${power(p)}`]);
    }
    return found.filter(inside);
  }
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(axis.form === "count" ? 1 : 0, [1, 2, 5, 10].map((s) => s * power).find((s) => s >= raw * 0.999));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9; i++) found.push([i * step, number(Number((i * step).toPrecision(12)), axis, 6)]);
  return found;
}

// Above the figure: what the colours mean, and the names of the lines, which show and hide them.
function key(place, panels, redraw) {
  const box = place.querySelector(".key");
  box.replaceChildren();
  const add = (tag, text, name = "") => Object.assign(box.appendChild(document.createElement(tag)), { textContent: text, className: name });
  const shade = panels[0].roles.colour;
  if (shade?.title) {
    add("span", shade.title);
    add("span", number(shade.range[0], shade, 3));
    add("i", "").style.background = `linear-gradient(90deg, ${stops(shade.palette).join(", ")})`;
    add("span", number(shade.range[1], shade, 3));
  }
  for (const panel of panels) {
    const named = panel.kind === "lines" && panel.grids.length > 1 ? panel.grids.filter((line) => line.name) : [];
    const every = Math.ceil(named.length / 16);
    named.forEach((line, i) => {
      if (i % every) return;
      const button = add("button", line.name, line.hidden ? "off" : "");
      button.style.setProperty("--colour", line.ink);
      button.setAttribute("aria-pressed", String(!line.hidden));
      button.title = "show or hide";
      button.onclick = () => { line.hidden = !line.hidden; redraw(); };
    });
  }
}

function height(panels) {
  const rows = panels[0].roles.y.labels;
  if (panels.length > 1) return 140 + 170 * panels.length;
  if (panels[0].kind === "floorplan") return Math.min(4000, 120 + 90 * rows.filter(Boolean).length);
  return isCells(panels[0]) ? Math.min(1000, Math.max(300, 120 + 18 * rows.length)) : 340;
}

function draw(place) {
  const { panels } = place, whole = height(panels), stacked = panels.length > 1;
  key(place, panels, () => draw(place));
  const svg = place.querySelector("svg");
  svg.replaceChildren();
  const full = Math.max(250, place.clientWidth);
  svg.setAttribute("width", full);
  svg.setAttribute("height", whole);
  const across = measure(panels, "x"), rows = panels.map((panel) => ({ panel, y: measure([panel], "y") }));

  // Room for labels: as wide as the longest, thinned out where they would touch.
  const yTicks = rows.map(({ y }) => ticks(y, whole / panels.length, 40));
  const hasTitle = !stacked && rows[0].y.title;
  const left = Math.min(full * 0.45, Math.max(24, ...yTicks.flat().map(([, text]) => width(text) + 10)) + (hasTitle ? 20 : 0));
  const hasNotes = stacked || panels[0].marks.some((mark) => mark.text);
  const plot = { left, right: full - 12, top: hasNotes ? 34 : 22, bottom: whole };
  const xTicks = ticks(across, plot.right - left, 60);
  const longest = Math.max(0, ...xTicks.map(([, text]) => width(text)));
  const perUnit = (plot.right - left) / Math.abs(across.high - across.low || 1);
  const between = xTicks.length > 1 ? Math.abs(xTicks[1][0] - xTicks[0][0]) * perUnit : Infinity;
  const tilted = longest + 8 > between && across.labels.length && longest > 22;
  const every = Math.max(1, Math.ceil((tilted ? 13 : longest + 8) / between));
  const labels = 8 + (tilted ? longest * 0.87 + 8 : 14), onTop = across.form === "tokens";
  plot[onTop ? "top" : "bottom"] += onTop ? labels - 14 : -labels;
  plot.bottom -= across.title ? 20 : 4;
  if (!onTop && !hasNotes) plot.top = 8;

  const scale = (axis, from, to) => {
    axis.to_px = (at) => from + ((at - axis.low) / (axis.high - axis.low)) * (to - from);
    axis.px = (v) => axis.to_px(axis.at(v));
    [axis.from, axis.to] = [from, to];
  };
  scale(across, plot.left, plot.right);
  const gap = stacked ? 0.3 / (rows.length + 1) : 0, each = (1 - gap * (rows.length - 1)) / rows.length, deep = plot.bottom - plot.top;
  rows.forEach(({ y }, i) => { const top = plot.top + i * (each + gap) * deep; scale(y, top + each * deep, top); });

  place.points = [];
  rows.forEach(({ panel, y }, i) => {
    const x = across, isLast = i === rows.length - 1, grid = !isCells(panel), group = put(svg, "g", { class: "axis" });
    put(group, "path", { class: "frame", d: `M${x.from} ${y.to}V${y.from}H${x.to}` });
    const thin = Math.ceil((13 * yTicks[i].length) / (y.from - y.to));
    yTicks[i].forEach(([v, text], k) => {
      if (y.labels.length && k % thin) return;
      const at = y.to_px(v);
      if (grid) put(group, "path", { class: "rule", d: `M${x.from} ${at}H${x.to}` });
      put(group, "text", { class: "tick", x: x.from - 6, y: at + 4, "text-anchor": "end" }, text);
    });
    if (hasTitle) put(group, "text", { class: "axis-name", transform: `translate(12 ${(y.from + y.to) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.title);
    xTicks.forEach(([v, text], k) => {
      if (k % every) return;
      const at = x.to_px(v), edge = onTop ? y.to : y.from;
      if (grid && !panel.marks.some((mark) => mark.text) && panel.kind !== "bars") put(group, "path", { class: "rule", d: `M${at} ${y.from}V${y.to}` });
      const turned = { transform: `translate(${at + (onTop ? 2 : 4)} ${edge + (onTop ? -5 : 14)}) rotate(-60)`, "text-anchor": onTop ? "start" : "end" };
      if (isLast) put(group, "text", { class: "tick", ...(tilted ? turned : { x: at, y: edge + (onTop ? -6 : 16), "text-anchor": "middle" }) }, text);
    });
    if (isLast && x.title) put(group, "text", { class: "axis-name", x: (x.from + x.to) / 2, y: whole - 6, "text-anchor": "middle" }, x.title);
    if (isCells(panel)) drawCells(svg, panel, x, y, place.points);
    else for (const line of panel.grids) if (!line.hidden) drawLine(svg, panel, line, x, y, place.points);
    drawMarks(svg, panel, x, y);
    const size = Math.min(12, (12 * (full - x.from)) / width(y.title));
    if (stacked) put(svg, "text", { class: "tick", x: x.from, y: y.to - 4, style: `font-size: ${size}px` }, y.title);
  });
  place.mark = put(svg, "path", { class: "pointed" });
}

function drawMarks(svg, panel, x, y) {
  let end = -Infinity, raised = 0;
  for (const { x: at, y: down, text, look } of panel.marks) {
    if (Array.isArray(at) && Array.isArray(down)) {
      const [[x0, x1], [y0, y1]] = [at.map(x.px), down.map(y.px)];
      put(svg, "path", { class: "mark", d: `M${x0} ${y0}H${x1}V${y1}H${x0}Z`, style: `stroke: ${look}; stroke-width: 2` });
      continue;
    }
    const line = at === null ? `M${x.from} ${y.px(down)}H${x.to}` : `M${x.px(Array.isArray(at) ? at[0] : at)} ${y.to}V${y.from}`;
    if (look !== "none") put(svg, "path", { class: `mark ${text ? "pass" : look}`, d: line });
    if (!text) continue;
    // A name that would run into the one beside it stands above it.
    const middle = x.px((at[0] + at[1]) / 2), half = width(text, 11) / 2;
    raised = middle - half < end + 4 && !raised ? 13 : 0;
    end = middle + half;
    put(svg, "text", { class: "tick", x: middle, y: y.to - 4 - raised, "text-anchor": "middle" }, text);
  }
}

function drawCells(svg, panel, x, y, points) {
  const group = put(svg, "g", { class: "cells" }), [{ colour: z, text, said }] = panel.grids, shade = panel.roles.colour;
  const rows = z.length, columns = z[0].length, colour = colours(shade.palette);
  const scaled = (v) => (shade.scale === "rank" ? Math.log10(v + 1) : v), [low, high] = shade.range.map(scaled);
  const share = (v) => (high > low ? (scaled(v) - low) / (high - low) : 0.5);
  const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows });
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  z.forEach((row, i) => row.forEach((v, j) => { if (v !== null) image.data.set([...colour(share(v)), 255], 4 * (i * columns + j)); }));
  context.putImageData(image, 0, 0);
  const [left, top, wide, deep] = [x.from, y.to, x.to - x.from, y.from - y.to];
  put(group, "image", { href: canvas.toDataURL(), x: left, y: top, width: wide, height: deep, preserveAspectRatio: "none", style: "image-rendering: pixelated" });
  if (Math.max(rows, columns) <= 64 && wide / columns > 4 && deep / rows > 4) {
    for (let j = 1; j < columns; j++) put(group, "path", { class: "gap", d: `M${left + (j * wide) / columns} ${top}v${deep}` });
    for (let i = 1; i < rows; i++) put(group, "path", { class: "gap", d: `M${left} ${top + (i * deep) / rows}h${wide}` });
  }
  text?.forEach((row, i) => row.forEach((word, j) => {
    const [r, g, b] = colour(share(z[i][j])), dark = 0.3 * r + 0.59 * g + 0.11 * b < 140;
    put(group, "text", { x: x.px(j), y: y.px(i) + 4, "text-anchor": "middle", "font-size": 12, fill: dark ? "#fff" : "#111" }, word);
  }));
  const [down, along] = [placesOf(panel.roles.y), placesOf(panel.roles.x)];
  points.push({ inside: (px, py) => px >= left && px <= left + wide && py >= top && py <= top + deep, find: (px, py) => {
    const j = Math.min(columns - 1, Math.floor(((px - left) / wide) * columns)), i = Math.min(rows - 1, Math.floor(((py - top) / deep) * rows));
    const words = said?.[i][j] ?? `${down[i]} · ${along[j]}\n${text ? `${text[i][j]} ` : ""}${number(z[i][j] ?? NaN, shade)}`;
    return { far: 0, text: z[i][j] === null ? "" : words, d: `M${left + (j * wide) / columns} ${top + (i * deep) / rows}h${wide / columns}v${deep / rows}h${-wide / columns}z` };
  } });
}

function drawLine(svg, panel, line, x, y, points) {
  const group = put(svg, "g", { class: "line" }), isPath = panel.kind === "trajectories", along = line.x ?? line.y.map((_, i) => i);
  const at = line.y.map((v, i) => [x.px(along[i]), y.px(v), i]).filter(([px, py]) => Number.isFinite(px) && Number.isFinite(py));
  const shade = panel.roles.colour, ramp = isPath ? colours(shade.palette) : null, [low, high] = shade?.range ?? [];
  const colour = (i) => (isPath ? `rgb(${[...ramp((line.colour[i] - low) / (high - low || 1))].join()})` : line.ink);
  if (panel.kind === "bars") {
    const half = 0.4 * Math.abs(x.px(1) - x.px(0)), base = y.px(Math.max(0, y.low));
    for (const [px, py] of at) put(group, "rect", { class: "bar", x: px - half, y: Math.min(py, base), width: 2 * half, height: Math.max(1, Math.abs(py - base)), fill: line.ink });
  } else {
    // A value that is missing leaves a gap.
    const path = at.map(([px, py, i], k) => `${k && at[k - 1][2] === i - 1 ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`).join("");
    const look = isPath ? { stroke: "#999", "stroke-width": 0.7 } : { stroke: line.ink, "stroke-width": 2, "stroke-dasharray": DASHES[line.dash] ?? "none" };
    if (!line.points) put(group, "path", { class: "stroke", d: path, ...look });
    for (const [px, , i] of at) {
      if (line.band?.[i]) put(group, "path", { class: "stroke", d: `M${px} ${y.px(line.y[i] - line.band[i])}V${y.px(line.y[i] + line.band[i])}`, stroke: line.ink, "stroke-width": 1.2 });
    }
    for (const [px, py, i] of at) put(group, "circle", { cx: px.toFixed(1), cy: py.toFixed(1), r: line.points ? 5 : isPath ? 3.5 : 3, fill: colour(i) });
  }
  const say = (i) => {
    const spread = line.band ? ` ± ${number(line.band[i], null, 3)}` : "";
    const where = x.labels.length ? x.labels[i] : `${x.title || "x"} ${number(along[i])}`;
    return [line.name, line.text?.[i], `${where}: ${number(line.y[i])}${spread}`].filter(Boolean).join("\n");
  };
  points.push({ inside: (_, py) => py >= y.to - 12 && py <= y.from + 12, find: (px, py) => {
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

// Draw panels into an element, and again whenever its width changes.
function drawPanels(place, panels, label) {
  for (const { grids, roles } of panels) {
    grids.forEach((line, i) => { line.ink ??= COLOURS[i % COLOURS.length]; });
    if (roles.colour) roles.colour.range ??= span(finite(grids.flatMap((grid) => grid.colour.flat())));
  }
  place.panels = panels;
  place.appendChild(Object.assign(document.createElement("div"), { className: "key" }));
  put(place, "svg", { role: "img", "aria-label": label });
  place.addEventListener("pointermove", point);
  place.addEventListener("pointerdown", point);
  place.addEventListener("pointerleave", () => { tip.style.display = "none"; place.mark?.setAttribute("d", ""); });
  let wide = 0;
  new ResizeObserver(() => { if (place.clientWidth !== wide) { wide = place.clientWidth; draw(place); } }).observe(place);
  draw(place);
}
addEventListener("scroll", () => { tip.style.display = "none"; }, { passive: true });
