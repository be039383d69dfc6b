// Draws the panels of the page, which lie beside their places as JSON.
const places = [...document.querySelectorAll(".drawing")];
for (const place of places) {
  const label = place.closest("figure").querySelector("figcaption").textContent;
  drawPanels(place, JSON.parse(place.querySelector("script").textContent), label);
}
// What is wider than the page fades at its right edge as long as there is more.
for (const wide of document.querySelectorAll(".scroll")) {
  const look = () => wide.classList.toggle("more", wide.scrollLeft + wide.clientWidth < wide.scrollWidth - 2);
  wide.addEventListener("scroll", look, { passive: true });
  new ResizeObserver(look).observe(wide);
}
document.documentElement.dataset.drawn = places.length;
