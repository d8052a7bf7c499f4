(() => {
  "use strict";
  const config = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    displayModeBar: matchMedia("(hover: none)").matches ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const plots = [...document.querySelectorAll("[data-plot]")];
  const spec = (div) =>
    JSON.parse(document.querySelector(`script[data-figure="${Number(div.dataset.plot)}"]`).textContent);
  const draw = (div) => {
    if (div.dataset.drawn) return;
    div.dataset.drawn = "1";
    const s = spec(div);
    Plotly.newPlot(div, { data: s.data, layout: s.layout, frames: s.frames, config });
  };
  // Browsers keep about 16 WebGL contexts alive and a WebGL plot takes several: those far out of sight give theirs back.
  const forget = (div) => {
    if (div.dataset.gl !== "true" || !div.dataset.drawn) return;
    Plotly.purge(div);
    delete div.dataset.drawn;
  };
  const near = new IntersectionObserver(
    (seen) => seen.forEach((e) => (e.isIntersecting ? draw(e.target) : forget(e.target))),
    { rootMargin: "500px 0px" });
  plots.forEach((div) => near.observe(div));

  addEventListener("beforeprint", () => plots.forEach((div) => {
    draw(div);
    if (div.layout) Plotly.relayout(div, { width: Math.min(680, div.clientWidth), autosize: false });
  }));
  addEventListener("afterprint", () => plots.forEach((div) =>
    div.layout && Plotly.relayout(div, { width: null, autosize: true })));

  const button = document.querySelector("[data-toggle-code]");
  if (button) button.addEventListener("click", () => {
    const open = button.getAttribute("aria-pressed") !== "true";
    document.querySelectorAll("details.code").forEach((d) => { d.open = open; });
    button.setAttribute("aria-pressed", String(open));
    button.textContent = open ? "Hide all code" : "Show all code";
  });
  const toc = document.querySelector(".toc details");
  if (toc && matchMedia("(max-width: 1099px)").matches) toc.open = false;
})();
