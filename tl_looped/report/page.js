// Draws the figures in the colours of the page, and again when these change.
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function colours(layout) {
  const style = getComputedStyle(document.documentElement);
  const [text, line] = ["--text", "--line"].map((name) => style.getPropertyValue(name).trim());
  const drawn = structuredClone(layout);
  drawn.paper_bgcolor = drawn.plot_bgcolor = "rgba(0,0,0,0)";
  drawn.font = { ...drawn.font, color: text };
  for (const name of Object.keys(drawn).filter((key) => /^[xy]axis/.test(key))) {
    Object.assign(drawn[name], { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true });
    if (drawn[name].title) drawn[name].title.standoff = 10;
  }
  return drawn;
}

function draw(place) {
  const { data, layout } = JSON.parse(place.querySelector("script").textContent);
  const target = place.querySelector(".plot");
  return Plotly.react(target, data, colours(layout), { responsive: true, displaylogo: false });
}

const places = [...document.querySelectorAll(".plotly-figure")];
const drawAll = () => Promise.all(places.map(draw));
dark.addEventListener("change", drawAll);
drawAll().then(() => { document.documentElement.dataset.drawn = places.length; });
