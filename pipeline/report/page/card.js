"use strict";
// One row: reference beside result, its loss, its times, and all that is known of it.

class Card {
  constructor(row, place) {
    this.row = row;
    this.place = place;
    this.element = make("article", `card ${row.status}`);
    this.element.dataset.id = row.id;
    this.arrows = null;
    this.player = null;
    this.element.append(
      this.heading(),
      this.stage(),
      ...(row.error ? [this.reason()] : []),
      this.facts(),
      ...(row.losses?.length > 1 ? [this.lossCurve()] : []),
      this.times(),
      this.details(),
    );
  }

  heading() {
    const { row } = this;
    const badges = make("p", "badges", make("span", "badge method", row.variant ?? "–"));
    if (row.category) badges.append(make("span", "badge", row.category));
    if (row.status !== "ok") badges.append(make("span", `badge ${row.status}`, row.status));
    if (row.seed !== null) badges.append(make("span", "badge quiet", `seed ${row.seed}`));
    const title = make("h3", "", row.prompt ?? row.referenceName ?? row.id);
    title.id = `title-${row.id}`;
    this.element.setAttribute("aria-labelledby", title.id);
    return make("header", "", badges, title);
  }

  stage() {
    const { row } = this;
    const note = row.reference && data.index.references[row.reference];
    const sources = [];
    const stage = make("div", "stage");
    if (row.reference) {
      const canvas = make("canvas", "arrows");
      canvas.hidden = true;
      canvas.setAttribute("aria-hidden", "true");
      const figure = this.screen("reference", note ? null : `references/${row.reference}.mp4`, note, sources);
      if (!note) {
        figure.firstChild.append(canvas);
        this.caption = figure.lastChild;
        this.arrows = new Arrows(canvas);
      }
      stage.append(figure);
    }
    if (row.isVideo) stage.append(this.screen("result", row.output, null, sources));
    else if (row.kind !== "extract") stage.append(this.screen("result", null, this.withoutVideo(), sources));
    if (!sources.length) return stage;
    return make("div", "", stage, this.control(sources));
  }

  withoutVideo() {
    if (this.row.error) return `No result: the row ${this.row.status === "failed" ? "failed" : "was given up"}.`;
    return this.row.output ? "The output is a motion bank." : "No video.";
  }

  // A video with its caption, or what stands in its place.
  screen(caption, src, note, sources) {
    const frame = make("div", "frame");
    const { width, height } = this.row;
    const video = data.index.settings[this.row.settings].video;
    frame.style.aspectRatio = `${width ?? video?.width ?? 16} / ${height ?? video?.height ?? 9}`;
    if (src) {
      const element = make("video");
      element.setAttribute("aria-label", `${caption}: ${caption === "result" ? this.row.prompt ?? "" : this.row.referenceName ?? ""}`);
      element.preload = "none";
      frame.append(element);
      const lost = () => frame.replaceChildren(make("p", "missing", `${caption}: ${src} cannot be played. Is it still there?`));
      sources.push({ video: element, src, onError: lost });
    } else {
      frame.append(make("p", "missing", note));
    }
    return make("figure", "", frame, make("figcaption", "", caption));
  }

  control(sources) {
    const button = make("button", "play", "▶");
    button.type = "button";
    button.setAttribute("aria-label", "Play");
    const slider = make("input");
    Object.assign(slider, { type: "range", min: 0, max: 1000, value: 0 });
    slider.setAttribute("aria-label", "Position in the videos");
    this.player = new Player(sources, slider, button, (progress) => this.arrows?.at(progress));
    return make("div", "control", button, slider);
  }

  reason() {
    const { error, attempts } = this.row;
    const tries = attempts > 1 ? ` after ${attempts} attempts` : "";
    return make("div", "reason", make("strong", "", `${words(error.kind ?? "error")}${tries}: ${error.class ?? ""}`), make("p", "", error.message ?? ""));
  }

  facts() {
    const { rows, figures, measured } = data.index;
    const [first, final] = [rows.loss_first[this.place], rows.loss_final[this.place]];
    const list = make("dl", "facts");
    const fact = (name, value) => list.append(make("div", "", make("dt", "", name), make("dd", "", value)));
    if (final !== null && final !== undefined) fact("motion loss", `${number(first)} → ${number(final)}`);
    figures.forEach((figure, n) => {
      if (measured[n][this.place] !== null) fact(words(figure.name), number(measured[n][this.place]));
    });
    return list;
  }

  // All iterations in order; steps, of `iterations` each, are told apart by bands.
  lossCurve() {
    const { losses, iterations } = this.row;
    const known = losses.filter((loss) => loss !== null);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    const x = (n) => (100 * n) / (losses.length - 1);
    const y = (loss) => 30 - (28 * (loss - low)) / (high - low || 1) - 1;
    const steps = iterations && losses.length % iterations === 0 ? losses.length / iterations : 1;
    const bands = Array.from({ length: steps }, (_, step) => step)
      .filter((step) => step % 2 === 1)
      .map((step) => drawn("rect", { x: Math.max(0, x(step * iterations - 0.5)), width: x(iterations), y: 0, height: 30, class: "band" }));
    const points = losses.map((loss, n) => (loss === null ? null : `${x(n).toFixed(2)},${y(loss).toFixed(2)}`)).filter(Boolean);
    const label = `Motion loss over ${losses.length} iterations${steps > 1 ? ` in ${steps} steps` : ""}: from ${number(losses[0])} to ${number(losses.at(-1))}`;
    const curve = drawn("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", class: "curve", role: "img", "aria-label": label }, ...bands, drawn("polyline", { points: points.join(" ") }));
    const title = drawn("title", {});
    title.textContent = label;
    curve.prepend(title);
    const caption = `loss of ${losses.length} iterations${steps > 1 ? `, ${steps} steps` : ""}, ${number(low)} to ${number(high)}`;
    return make("figure", "loss", curve, make("figcaption", "", caption));
  }

  times() {
    const spent = this.row.seconds.map((value) => value ?? 0);
    const total = spent.reduce((sum, value) => sum + value, 0);
    if (!(total > 0)) return "";
    const legend = make("ul", "legend", make("li", "", make("b", "", seconds(total))));
    spent.forEach((value, phase) => {
      if (value >= total / 20) legend.append(make("li", "", make("span", `dot p${phase}`), `${data.index.phases[phase]} ${seconds(value)}`));
    });
    return make("div", "times", phaseBar(spent, total), legend);
  }

  details() {
    const element = make("details", "", make("summary", "", "Settings and numbers"));
    element.addEventListener("toggle", () => element.open && element.children.length === 1 && element.append(this.numbers()));
    return element;
  }

  numbers() {
    const { row } = this;
    const list = make("dl", "numbers");
    const tell = (name, value) => {
      if (value === null || value === undefined || value === "") return;
      list.append(make("dt", "", words(name)), make("dd", "", typeof value === "object" ? JSON.stringify(value) : String(value)));
    };
    tell("row id", row.id);
    if (row.output) list.append(make("dt", "", "output"), make("dd", "", link(row.output)));
    tell("reference", row.referenceUri);
    tell("bank", row.bank);
    tell("size", row.frames && `${row.frames} frames of ${row.width} x ${row.height}, ${number(row.fps)} a second`);
    data.index.phases.forEach((phase, n) => row.seconds[n] > 0 && tell(phase, seconds(row.seconds[n])));
    tell("peak memory", row.peak_memory_bytes && `${number(row.peak_memory_bytes / 2 ** 20)} MiB`);
    tell("last attempt", row.total !== null ? seconds(row.total) : null);
    tell("attempts", row.attempts);
    tell("device", [row.device, row.node].filter(Boolean).join(" on "));
    tell("ended", row.finished);
    for (const [name, value] of Object.entries(row.own)) tell(name, value);
    for (const [section, values] of Object.entries(data.index.settings[row.settings])) {
      if (values === null || typeof values !== "object") tell(section, values);
      else for (const [name, value] of Object.entries(values)) tell(`${section}: ${name}`, value);
    }
    return list;
  }

  async showArrows(on) {
    if (!this.arrows) return;
    this.arrowsWanted = on;
    const motion = on && this.row.motion ? await data.motion(this.row.motion).catch(() => null) : null;
    if (this.arrowsWanted !== on) return;
    this.arrows.set(motion);
    this.caption.textContent = on && !motion ? "reference (no flow)" : "reference";
  }
}

function link(path) {
  const anchor = make("a", "", path.split("/").at(-1));
  anchor.href = path;
  return anchor;
}
