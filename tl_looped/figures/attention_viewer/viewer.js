(name, data) => {
  const bytes = Uint8Array.from(atob(data.values), (c) => c.charCodeAt(0));
  const { tokens, heads, stacks, first, causal } = data;
  const n = tokens.length, nQueries = n - first;
  // A query's row ends at itself where attention is causal, so row q begins after those of the queries from `first` on.
  const rowStart = (q) => (causal ? ((q - first) * (q + first + 1)) / 2 : (q - first) * n);
  const perHead = rowStart(n);
  const menu = [];
  let offset = 0;
  for (const [stack, loops, layers] of stacks) {
    for (const layer of layers) {
      menu.push({ stack, layer, loops, offset });
      offset += loops.length * heads.length * perHead;
    }
  }
  const word = (k) => tokens[k].replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\r/g, "␍") || "∅";
  const clip = (text) => (text.length > 12 ? text.slice(0, 11) + "…" : text);
  const looped = (view) => view.loops[0] !== "";
  const prefix = (stack) => (stack === "core" ? "" : stack + " ");
  const passName = (view, row) => prefix(view.stack) + (looped(view) ? "loop " + view.loops[row] : "");

  function element(tag, attributes = {}, ...children) {
    const svg = ["svg", "text", "rect"].includes(tag);
    const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function start(host) {
    const root = host.attachShadow({ mode: "open" });
    const state = { view: Math.max(0, menu.findIndex(looped)), minus: false };

    const value = (row, head, q, k) => {
      if (k > q && causal) return 0;
      const view = menu[state.view];
      const at = (t) => bytes[view.offset + (t * heads.length + head) * perHead + rowStart(q) + k] / 255;
      return state.minus ? at(row) - at(row - 1) : at(row);
    };
    // Opacity is the root of the weight, so that a tenth can still be seen. The page shines through: its theme is the figure's.
    const shade = (v) => `rgba(var(${v < 0 ? "--out" : "--in"}), ${Math.sqrt(Math.abs(v)).toFixed(3)})`;

    function paint(canvas, row, head) {
      [canvas.width, canvas.height] = [n, nQueries];
      const context = canvas.getContext("2d");
      const image = context.createImageData(n, nQueries);
      for (let q = first, i = 0; q < n; q++) {
        for (let k = 0; k < n; k++, i += 4) {
          const v = value(row, head, q, k);
          image.data.set(v < 0 ? [217, 95, 14] : [47, 127, 214], i);
          image.data[i + 3] = 255 * Math.sqrt(Math.abs(v));
        }
      }
      context.putImageData(image, 0, 0);
    }

    const select = element("select", { "aria-label": "layer" });
    menu.forEach(({ stack, layer }, i) => select.append(element("option", { value: i }, `${prefix(stack)}layer ${layer}`)));
    select.value = state.view;
    const minus = element("input", { type: "checkbox" });
    const minusText = element("span");
    const minusLabel = element("label", {}, minus, minusText);
    const legend = element("span", { class: "legend" });
    const grid = element("div", { class: "grid", role: "group", "aria-label": "heads" });
    const title = element("div", { class: "name" });
    const said = element("div", { class: "said", "aria-live": "polite" });
    const matrix = element("div", { class: "matrix", tabindex: 0, role: "application" });
    const canvas = element("canvas");
    const svg = element("svg");
    const words = element("div", { class: "words" });
    matrix.append(canvas, svg);
    const scroll = element("div", { class: "scroll" }, matrix);
    const large = element("div", { class: "large" }, title, said, scroll, words);
    const hint = "Point at a head or a cell to see it, click to keep it, Esc to let go. Arrow keys move in the heads and in the pattern. ";
    root.append(
      element("style", {}, data.style),
      element("div", { class: "bar" }, select, minusLabel, legend),
      element("div", { class: "both" }, element("div", { class: "heads" }, grid), large),
      element("p", { class: "hint" }, hint + "Rows are queries, columns keys."),
      ...(data.note ? [element("p", { class: "note" }, data.note)] : []));

    // What is shown: what is pointed at, else what was clicked, else the last loop's first head and the last query.
    const head = () => state.overHead ?? state.keptHead ?? { row: menu[state.view].loops.length - 1, head: 0 };
    const cell = () => state.overCell ?? state.keptCell ?? { q: n - 1 };
    const same = (a, b) => a && b && a.row === b.row && a.head === b.head;
    const possible = (row) => !state.minus || row > 0;

    let buttons = [];
    function drawGrid() {
      const view = menu[state.view];
      const isGapless = view.loops.every((loop, row) => row === 0 || loop === view.loops[row - 1] + 1);
      minusText.textContent = isGapless ? "minus the loop before" : "minus the row above";
      minusLabel.style.display = view.loops.length < 2 ? "none" : "";
      if (view.loops.length < 2) minus.checked = state.minus = false;
      state.keptHead = state.keptHead && view.loops[state.keptHead.row] !== undefined ? state.keptHead : undefined;
      if (state.keptHead && !possible(state.keptHead.row)) state.keptHead = undefined;
      grid.style.gridTemplateColumns = `max-content repeat(${heads.length}, ${heads.length * view.loops.length > 24 ? 44 : 64}px)`;
      buttons = [];
      const cells = [element("span", { class: "column corner" }, "head")];
      for (const h of heads) cells.push(element("span", { class: "column" }, String(h)));
      view.loops.forEach((_, row) => {
        const name = passName(view, row).trim();
        cells.push(element("span", { class: "row" }, name));
        heads.forEach((h, head) => {
          const button = element("button", { type: "button", "aria-label": `${name}, layer ${view.layer}, head ${h}`, tabindex: -1 });
          const thumb = element("canvas", { class: n <= 64 ? "sharp" : "" });
          button.disabled = !possible(row);
          if (!button.disabled) paint(thumb, row, head);
          button.append(thumb);
          Object.assign(button, { at: { row, head } });
          buttons.push(button);
          cells.push(button);
        });
      });
      grid.replaceChildren(...cells);
      legend.replaceChildren(...(state.minus ? ["−1", element("i"), "+1"] : ["0", element("i"), "1"]));
      const steps = state.minus ? [-1, -0.5625, -0.25, -0.0625, 0, 0.0625, 0.25, 0.5625, 1] : [0, 0.0625, 0.25, 0.5625, 1];
      legend.querySelector("i").style.background = `linear-gradient(90deg, ${steps.map(shade).join(", ")})`;
      drawHead();
    }

    let shownHead;
    function drawHead() {
      const at = head(), view = menu[state.view];
      for (const button of buttons) {
        button.classList.toggle("seen", same(button.at, at) && !same(at, state.keptHead));
        button.classList.toggle("kept", Boolean(same(button.at, state.keptHead)));
        button.setAttribute("aria-pressed", String(Boolean(same(button.at, state.keptHead))));
        button.tabIndex = same(button.at, at) ? 0 : -1;
      }
      const before = state.minus ? ` minus ${passName(view, at.row - 1)}` : "";
      title.textContent = `${[passName(view, at.row).trim(), `layer ${view.layer}`, `head ${heads[at.head]}`].join(", ")}${before}`;
      paint(canvas, at.row, at.head);
      shownHead = at;
      drawCell();
    }

    let size = 0, left = 0, above = 0;
    function layOut() {
      const longest = Math.max(...tokens.map((_, k) => clip(word(k)).length));
      left = above = 12 + 6.7 * Math.min(12, longest);
      const room = (scroll.clientWidth || 320) - left - 4;
      size = Math.max(3, Math.min(26, room / n, Math.max(12, 480 / n)));
      canvas.className = size >= 1 ? "sharp" : "";
      Object.assign(canvas.style, { left: `${left}px`, top: `${above}px`, width: `${size * n}px`, height: `${size * nQueries}px` });
      Object.assign(matrix.style, { width: `${left + size * n + 3}px`, height: `${above + size * nQueries + 3}px` });
    }

    function drawCell() {
      const { row, head } = shownHead, view = menu[state.view], { q } = cell();
      const weights = tokens.map((_, k) => value(row, head, q, k));
      const strongest = weights.reduce((best, v, k) => (Math.abs(v) > Math.abs(weights[best]) ? k : best), 0);
      const k = cell().k ?? strongest;
      const text = (at) => `${at} “${word(at)}”`;
      const sign = (v) => (state.minus && v > 0 ? "+" : v < 0 ? "−" : "") + Math.abs(v).toFixed(2);
      const what = cell().k === undefined ? ", its strongest" : "";
      said.textContent = k > q && causal
        ? `Query ${text(q)} cannot see key ${text(k)}, which is later.`
        : `Query ${text(q)} → key ${text(k)}${what}: ${sign(weights[k])}`;
      matrix.setAttribute("aria-label", `${title.textContent}. ${said.textContent}`);
      const every = Math.ceil(12 / size);
      const shapes = [];
      const label = (at, across, bold) => {
        const along = (at - (across ? 0 : first) + 0.5) * size + (across ? left : above);
        const place = across ? { transform: `translate(${along + 4} ${above - 5}) rotate(-90)` } : { x: left - 5, y: along + 4, "text-anchor": "end" };
        shapes.push(element("text", { ...place, class: bold ? "at" : "" }, clip(word(at))));
      };
      // Where there is no room for all, the labels beside those of the chosen query and key give way.
      const near = (at, chosen) => at !== chosen && Math.abs(at - chosen) < every;
      for (let at = first; at < n; at++) if (at === q || ((at - first) % every === 0 && !near(at, q))) label(at, false, at === q);
      for (let at = 0; at < n; at++) if (at === k || (at % every === 0 && !near(at, k))) label(at, true, at === k);
      const y = above + 1 + (q - first) * size;
      shapes.push(element("rect", { class: "mark", x: left + 1, y, width: size * n, height: size, opacity: 0.55 }));
      shapes.push(element("rect", { class: "mark", x: left + 1 + k * size, y, width: size, height: size }));
      svg.setAttribute("width", matrix.clientWidth);
      svg.setAttribute("height", matrix.clientHeight);
      svg.replaceChildren(...shapes);
      words.replaceChildren(...tokens.map((_, at) => {
        const span = element("span", { class: at === q ? "query" : "", title: sign(weights[at]) }, word(at));
        span.style.background = shade(weights[at]);
        span.at = at;
        return span;
      }));
    }

    function show(part) {
      Object.assign(state, part);
      "overHead" in part || "keptHead" in part ? drawHead() : drawCell();
    }

    const inGrid = (event) => event.target.closest("button:not(:disabled)")?.at;
    grid.addEventListener("pointerover", (event) => event.pointerType !== "touch" && inGrid(event) && show({ overHead: inGrid(event) }));
    grid.addEventListener("pointerleave", () => show({ overHead: undefined }));
    grid.addEventListener("focusin", (event) => inGrid(event) && show({ overHead: inGrid(event) }));
    grid.addEventListener("focusout", () => show({ overHead: undefined }));
    grid.addEventListener("click", (event) => {
      const at = inGrid(event);
      if (at) show({ keptHead: same(at, state.keptHead) ? undefined : at });
    });
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const at = inGrid(event);
      if (event.key === "Escape") show({ keptHead: undefined });
      if (!step || !at) return;
      event.preventDefault();
      event.stopPropagation();
      buttons.find((b) => b.at.row === at.row + step[0] && b.at.head === at.head + step[1] && !b.disabled)?.focus();
    });

    function inMatrix(event) {
      const box = canvas.getBoundingClientRect();
      const limit = (v, low) => Math.min(n - 1, Math.max(low, Math.floor(v)));
      return { q: limit(first + ((event.clientY - box.top - 1) / size), first), k: limit((event.clientX - box.left - 1) / size, 0) };
    }
    const alike = (a, b) => a && a.q === b.q && a.k === b.k;
    matrix.addEventListener("pointermove", (event) => event.pointerType !== "touch" && show({ overCell: inMatrix(event) }));
    matrix.addEventListener("pointerleave", () => show({ overCell: undefined }));
    matrix.addEventListener("click", (event) => {
      const at = inMatrix(event);
      show({ keptCell: alike(state.keptCell, at) ? undefined : at });
    });
    matrix.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") show({ keptCell: undefined, overCell: undefined });
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      const { q, k = 0 } = cell();
      const limit = (v, low) => Math.min(n - 1, Math.max(low, v));
      show({ keptCell: { q: limit(q + step[0], first), k: limit(k + step[1], 0) }, overCell: undefined });
    });
    const inWords = (event) => (event.target.at >= first ? { q: event.target.at } : undefined);
    words.addEventListener("pointerover", (event) => {
      if (event.pointerType !== "touch" && event.target.at !== undefined && event.target.at !== cell().q) show({ overCell: inWords(event) });
    });
    words.addEventListener("pointerleave", () => show({ overCell: undefined }));
    words.addEventListener("click", (event) => show({ keptCell: inWords(event), overCell: undefined }));

    select.addEventListener("change", () => { state.view = Number(select.value); state.overHead = undefined; drawGrid(); });
    minus.addEventListener("change", () => { state.minus = minus.checked; state.overHead = undefined; drawGrid(); });

    // Labels that stay while the heads scroll need the colour of what is behind the figure.
    function paper() {
      let node = host, colour = "";
      for (; node; node = node.parentElement) {
        colour = getComputedStyle(node).backgroundColor;
        if (!/^(transparent|rgba\(.*, 0\))$/.test(colour)) break;
      }
      host.style.setProperty("--paper", node ? colour : "Canvas");
    }
    host.addEventListener("pointerenter", paper);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paper);
    paper();
    drawGrid();
    new ResizeObserver(() => { layOut(); drawCell(); }).observe(scroll);
    layOut();
    drawCell();
  }

  // A notebook may show one output in two places.
  for (const host of document.getElementsByClassName(name)) if (!host.shadowRoot) start(host);
}
