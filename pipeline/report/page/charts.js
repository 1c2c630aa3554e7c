"use strict";
// The summary: tables whose cells are drawn, so that what is seen can also be read.

function drawStatuses() {
  const { statuses, rows } = data.index;
  const counts = statuses.map((_, code) => rows.status.filter((status) => status === code).length);
  const all = make("button", "status all", make("b", "", rows.id.length.toLocaleString("en")), " rows");
  all.type = "button";
  all.dataset.status = "";
  const buttons = statuses.map((status, code) => {
    const button = make("button", `status ${status}`, make("b", "", counts[code].toLocaleString("en")), ` ${status}`);
    button.type = "button";
    button.dataset.status = status;
    return button;
  });
  for (const button of [all, ...buttons]) {
    button.onclick = () => {
      view.change({ status: button.dataset.status });
      byId("controls").scrollIntoView();
    };
  }
  byId("statuses").replaceChildren(all, ...buttons.filter((_, code) => counts[code] > 0));
}

function drawCharts() {
  const { summary } = data.index;
  const charts = [
    summary.figures.length ? figuresChart(data.index.figures, summary.figures) : null,
    secondsChart(summary.seconds),
    summary.losses.length ? lossesChart(summary.losses) : null,
    methodsChart(summary.statuses),
  ];
  byId("charts").replaceChildren(...charts.filter(Boolean));
}

function panel(title, note, table) {
  return make("section", "panel", make("h3", "", title), note ? make("p", "note", note) : null, make("div", "scroll", table));
}

function tableOf(headings, rows) {
  const head = make("tr", "", ...headings.map((heading) => make("th", "", heading)));
  const lines = rows.map(([name, ...cells]) => {
    const first = make("th", "", name);
    first.scope = "row";
    first.title = name;
    return make("tr", "", first, ...cells.map((cell) => (cell instanceof HTMLTableCellElement ? cell : make("td", "", cell))));
  });
  for (const cell of head.children) cell.scope = "col";
  return make("table", "", make("thead", "", head), make("tbody", "", ...lines));
}

// Mean and interval of every figure and method: over all rows, or over those of one class of prompts.
function figuresChart(figures, entries) {
  const classes = [...new Set(entries.map((entry) => entry.category))];
  const section = panel("Metrics", "Mean over finished rows, with its 95 % bootstrap interval.", figuresTable(figures, entries, null));
  section.classList.add("wide");
  if (classes.length > 1) {
    const choice = make("select", "", ...classes.map((category, n) => new Option(category ?? "all rows", n)));
    choice.onchange = () => section.querySelector(".scroll").replaceChildren(figuresTable(figures, entries, classes[choice.value]));
    section.prepend(make("label", "choice", "Rows of ", choice));
  }
  const settings = figures.map(({ name, settings }) => [words(name), Object.entries(settings).filter(([, value]) => value !== null).map(([key, value]) => `${words(key)} ${value}`)]);
  const told = settings.filter(([, values]) => values.length).map(([name, values]) => `${name}: ${values.join(", ")}`);
  if (told.length) section.append(make("p", "note", `Measured with ${told.join("; ")}.`));
  return section;
}

function figuresTable(figures, entries, category) {
  const shown = entries.filter((entry) => entry.category === category);
  const variants = [...new Set(shown.map((entry) => entry.variant))];
  const scales = new Map(figures.map(({ name }) => [name, scaleOf(entries.filter((entry) => entry.figure === name))]));
  const cell = (variant, name) => {
    const entry = shown.find((other) => other.variant === variant && other.figure === name);
    return entry ? intervalCell(entry, scales.get(name)) : "–";
  };
  const lines = variants.map((variant) => [variant, ...figures.map(({ name }) => cell(variant, name))]);
  return tableOf(["method", ...figures.map(({ name }) => words(name))], lines);
}

// Where a value lies, from 0 to 100, between the ends of all intervals of a figure.
function scaleOf(entries) {
  const low = Math.min(...entries.map((entry) => entry.interval.low));
  const high = Math.max(...entries.map((entry) => entry.interval.high));
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return (value) => (100 * (value - low + room)) / (high - low + 2 * room);
}

function intervalCell({ interval, without }, scale) {
  const [left, middle, right] = [interval.low, interval.mean, interval.high].map(scale);
  const drawing = drawn(
    "svg",
    { viewBox: "0 0 100 10", preserveAspectRatio: "none", class: "interval", "aria-hidden": "true" },
    drawn("line", { x1: 0, x2: 100, y1: 5, y2: 5, class: "rail" }),
    drawn("line", { x1: left, x2: Math.max(right, left + 0.8), y1: 5, y2: 5, class: "span" }),
    drawn("line", { x1: middle, x2: middle, y1: 0.5, y2: 9.5, class: "mean" }),
  );
  const range = make("span", "range", ` ${number(interval.low)} to ${number(interval.high)}`);
  const cell = make("td", "measure", drawing, make("b", "", number(interval.mean, 3)), range);
  cell.title = `${interval.count} rows${without ? `, ${without} more have no value` : ""}`;
  return cell;
}

// Mean seconds of every phase, as one bar for each method.
function secondsChart(methods) {
  const totals = methods.map(({ means }) => means.reduce((sum, mean) => sum + mean, 0));
  const longest = Math.max(...totals);
  if (!(longest > 0)) return null;
  const lines = methods.map(({ variant, means }, n) => [
    variant,
    make("td", "drawing", phaseBar(means, longest)),
    make("td", "figure", seconds(totals[n])),
  ]);
  const section = panel("Seconds per row", "Mean over finished rows, by phase. What is done once for a reference counts for its first row.", tableOf(["method", "phases", "total"], lines));
  section.append(phaseLegend(methods.map(({ means }) => means)));
  return section;
}

function phaseBar(values, longest) {
  const bar = make("span", "phases");
  const told = [];
  values.forEach((value, phase) => {
    if (!(value > 0)) return;
    const part = make("span", `phase p${phase}`);
    part.style.width = `${(100 * value) / longest}%`;
    part.title = `${data.index.phases[phase]} ${seconds(value)}`;
    told.push(part.title);
    bar.append(part);
  });
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", told.join(", ") || "no times");
  return bar;
}

function phaseLegend(all) {
  const seen = (values, phase) => values[phase] > 0.005 * values.reduce((sum, value) => sum + value, 0);
  const used = data.index.phases.map((_, phase) => all.some((values) => seen(values, phase)));
  const items = data.index.phases.map((name, phase) => (used[phase] ? make("li", "", make("span", `dot p${phase}`), name) : null));
  return make("ul", "legend", ...items);
}

// First and final losses of every method, each over its own range: losses of different methods do not compare.
function lossesChart(methods) {
  const lines = methods.map((spread) => [
    spread.variant,
    make("td", "drawing", histogram(spread)),
    make("td", "figure", `${number(spread.medians[0])} → ${number(spread.medians[1])}`),
  ]);
  const section = panel("Motion loss, first and final", "How many rows have which loss. Every method has its own loss, and its own scale.", tableOf(["method", "small to large", "medians"], lines));
  section.append(make("ul", "legend", make("li", "", make("span", "dot first"), "first"), make("li", "", make("span", "dot final"), "final")));
  return section;
}

function histogram({ first, final, from, to, medians }) {
  const most = Math.max(...first, ...final);
  const bars = (counts, name) =>
    counts.map((count, n) => drawn("rect", { x: (100 * n) / counts.length, width: 92 / counts.length, y: 20 - (20 * count) / most, height: (20 * count) / most, class: name }));
  const label = `From ${number(from)} to ${number(to)}: medians ${number(medians[0])} first, ${number(medians[1])} final`;
  return drawn("svg", { viewBox: "0 0 100 20", preserveAspectRatio: "none", class: "histogram", role: "img", "aria-label": label }, ...bars(first, "first"), ...bars(final, "final"));
}

// Rows of every method by status.
function methodsChart(counted) {
  const used = data.index.statuses.filter((status) => counted.some((entry) => entry.status === status));
  const variants = [...new Set(counted.map((entry) => entry.variant))].sort();
  const rowsOf = (variant, status) => counted.find((entry) => entry.variant === variant && entry.status === status)?.rows ?? 0;
  const most = Math.max(...variants.map((variant) => used.reduce((sum, status) => sum + rowsOf(variant, status), 0)));
  const lines = variants.map((variant) => {
    const bar = make("span", "phases");
    for (const status of used) {
      const part = make("span", `phase ${status}`);
      part.style.width = `${(100 * rowsOf(variant, status)) / most}%`;
      bar.append(part);
    }
    bar.setAttribute("aria-hidden", "true");
    return [variant, make("td", "drawing", bar), ...used.map((status) => String(rowsOf(variant, status)))];
  });
  return panel("Rows by status", "", tableOf(["method", "", ...used], lines));
}
