(() => {
  "use strict";
  const config = { staticPlot: true, responsive: true, displayModeBar: false, showSendToCloud: false };
  const draw = (div) => {
    if (div.dataset.drawn) return;
    div.dataset.drawn = "1";
    const s = JSON.parse(document.querySelector(`script[data-figure="${Number(div.dataset.thumb)}"]`).textContent);
    Plotly.newPlot(div, { data: s.data, layout: s.layout, config });
  };
  const thumbs = [...document.querySelectorAll("[data-thumb]")];
  const near = new IntersectionObserver((seen) => seen.forEach((e) => e.isIntersecting && draw(e.target)),
    { rootMargin: "600px 0px" });
  thumbs.forEach((div) => near.observe(div));
  addEventListener("beforeprint", () => thumbs.forEach(draw));
})();
