"use strict";
(() => {
  const plots = [...document.querySelectorAll(".plot")];
  // Named one by one: plotly.js 4 would add a button that uploads the figure to a server.
  const flat = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const solid = [["toImage", "orbitRotation", "zoom3d", "resetCameraDefault3d"]];
  const buttons = [...document.querySelectorAll(".key button")];
  const filter = document.getElementById("filter");
  const rows = [...document.querySelectorAll("#table-runs tbody tr")];
  const hiddenRuns = new Set();

  // A curve is shown while its run is not filtered out, and the buttons of its run, group and split are pressed.
  const isOn = (kind, value) => {
    const button = buttons.find((each) => each.dataset[kind] === String(value));
    return !button || button.getAttribute("aria-pressed") === "true";
  };
  const isShown = (meta) =>
    !hiddenRuns.has(meta.run) && ["run", "group", "split"].every((kind) => isOn(kind, meta[kind]));
  const hasKey = ({ meta }) => meta && (meta.run !== undefined || meta.group !== undefined);

  const drawn = new Set();
  const draw = (plot) => {
    if (drawn.has(plot)) return;
    drawn.add(plot);
    const { data, layout } = JSON.parse(document.querySelector(`script[data-plot="${plot.dataset.figure}"]`).textContent);
    for (const trace of data) {
      if (hasKey(trace)) trace.visible = isShown(trace.meta);
    }
    const modeBarButtons = layout.scene ? solid : flat;
    Plotly.newPlot(plot, data, layout, { responsive: true, displaylogo: false, modeBarButtons });
  };

  // A long page draws what is near the window; paper gets everything.
  const seen = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "600px" },
  );
  plots.forEach((plot) => seen.observe(plot));

  const update = () => {
    for (const plot of drawn) {
      const places = plot.data.flatMap((trace, place) => (hasKey(trace) ? [place] : []));
      if (places.length) Plotly.restyle(plot, { visible: places.map((place) => isShown(plot.data[place].meta)) }, places);
    }
  };
  for (const button of buttons) {
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
      update();
    });
  }

  // Every word of the filter must be in the row.
  rows.forEach((row, place) => { row.dataset.run = String(place); });
  const applyFilter = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    hiddenRuns.clear();
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      if (row.hidden) hiddenRuns.add(Number(row.dataset.run));
    }
    for (const button of buttons) button.hidden = hiddenRuns.has(Number(button.dataset.run ?? -1));
    const shown = rows.length - hiddenRuns.size;
    document.getElementById("filtered").textContent = words.length ? `${shown} of ${rows.length} runs` : "";
    update();
  };
  let waiting = 0;
  filter?.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(applyFilter, 150); });

  // Numbers sort as numbers, the rest as text; cells without a value stay last.
  const compare = (a, b) => {
    const numbers = [Number(a), Number(b)];
    return numbers.some(Number.isNaN) ? a.localeCompare(b, undefined, { numeric: true }) : numbers[0] - numbers[1];
  };
  const sort = (header) => {
    const table = header.closest("table");
    const place = [...header.parentElement.children].indexOf(header);
    const isDown = header.getAttribute("aria-sort") === "ascending";
    for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", isDown ? "descending" : "ascending");
    const key = (row) => row.children[place].dataset.sort;
    const sorted = [...table.tBodies[0].rows].sort((a, b) =>
      (key(a) === "") - (key(b) === "") || (isDown ? -1 : 1) * compare(key(a), key(b)));
    table.tBodies[0].append(...sorted);
  };
  for (const button of document.querySelectorAll(".sort")) {
    button.addEventListener("click", () => sort(button.parentElement));
  }

  // The numbers of a figure, made when asked for.
  const LONGEST = 500;
  const cell = (row, tag, text) => {
    const element = document.createElement(tag);
    element.textContent = text;
    row.append(element);
    return element;
  };
  const listed = (trace) => (trace.z ? [] : [...(trace.x ?? [])].map((x, place) => [
    x, ...["y", "lowerfence", "q1", "median", "q3", "upperfence"].filter((name) => trace[name]).map((name) => trace[name][place]),
  ]));
  const plain = (value) => (typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value ?? "–"));
  const fill = (details) => {
    const plot = document.getElementById(`plot-${details.dataset.plot}`);
    draw(plot);
    details.querySelector(".scroll")?.remove();
    const box = document.createElement("div");
    box.className = "scroll";
    box.tabIndex = 0;
    const table = document.createElement("table");
    // Of the data given, arrays are packed; plotly keeps those of what it shows unpacked here.
    const lines = plot._fullData.flatMap((trace) => listed(trace).map((values) => [trace.name ?? "", ...values]));
    for (const line of lines.slice(0, LONGEST)) {
      const row = table.insertRow();
      line.forEach((value, place) => {
        if (place === 0) cell(row, "th", value).scope = "row";
        else cell(row, "td", plain(value)).className = "number";
      });
    }
    if (lines.length > LONGEST) {
      cell(table.insertRow(), "td", `and ${lines.length - LONGEST} more: hpcsngd report --json has all`).colSpan = 3;
    }
    box.append(table);
    details.append(box);
  };
  for (const details of document.querySelectorAll(".numbers")) {
    details.addEventListener("toggle", () => { if (details.open) fill(details); });
  }

  // Paper cannot be opened by a click, and is narrower than the screen.
  const resize = () => drawn.forEach((plot) => Plotly.Plots.resize(plot));
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.run:not([open])")];
    opened.forEach((element) => { element.open = true; });
    plots.forEach(draw);
    resize();
  });
  addEventListener("afterprint", () => {
    opened.forEach((element) => { element.open = false; });
    resize();
  });
})();
