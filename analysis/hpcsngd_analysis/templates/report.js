"use strict";
(() => {
  const drawings = JSON.parse(document.getElementById("drawings").textContent);
  const plots = [...document.querySelectorAll(".plot:not(.empty)")];
  // Named one by one: plotly.js 4 would add a button that uploads the figure to a server.
  const modeBarButtons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const config = { responsive: true, displaylogo: false, modeBarButtons };
  for (const plot of plots) {
    const { data, layout } = drawings[plot.id];
    Plotly.newPlot(plot, data, layout, config);
  }

  // A curve is shown while the button of its run and the button of its split are both pressed.
  const buttons = [...document.querySelectorAll(".key button")];
  const isOn = (kind, value) =>
    buttons.some((b) => b.dataset[kind] === String(value) && b.getAttribute("aria-pressed") === "true");
  const update = () => {
    for (const plot of plots) {
      const visible = plot.data.map(({ meta }) => isOn("run", meta.run) && isOn("split", meta.split));
      Plotly.restyle(plot, { visible });
    }
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      update();
    });
  }

  // Paper cannot be opened by a click, and is narrower than the screen.
  const resize = () => plots.forEach((plot) => Plotly.Plots.resize(plot));
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    opened.forEach((element) => { element.open = true; });
    resize();
  });
  addEventListener("afterprint", () => {
    opened.forEach((element) => { element.open = false; });
    resize();
  });
})();
