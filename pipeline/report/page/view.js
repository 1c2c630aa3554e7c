"use strict";
// Which rows are shown, in which order: a state that lives in the URL's hash, so that a view can be shared.

const CARDS_PER_PAGE = 24;
const DEFAULTS = { q: "", method: "", category: "", status: "", by: "", from: "", to: "", sort: "pair", down: "", arrows: "", page: "1" };

const view = {
  state: { ...DEFAULTS },

  read() {
    const given = new URLSearchParams(location.hash.slice(1));
    this.state = { ...DEFAULTS };
    for (const name of Object.keys(DEFAULTS)) if (given.has(name)) this.state[name] = given.get(name);
    if (!quantities().has(this.state.by)) this.state.by = "";
    if (!orders().has(this.state.sort)) this.state.sort = DEFAULTS.sort;
    this.state.page = String(Math.max(1, Math.floor(Number(this.state.page)) || 1));
  },

  // Takes a change into the hash; `show` follows from there. Whatever narrows the view begins with its first page.
  change(changes, replace = false) {
    const state = { ...this.state, page: "1", ...changes };
    const told = Object.entries(state).filter(([name, value]) => value !== DEFAULTS[name]);
    const hash = `#${new URLSearchParams(told).toString() || "all"}`; // an empty one would scroll to the top
    if (hash === location.hash) return;
    if (replace) location.replace(hash);
    else location.hash = hash;
  },

  // The places of the rows that are shown, in order, on all pages.
  places() {
    const { rows } = data.index;
    const kept = rows.id.map((_, place) => place).filter(this.filter());
    const value = orders().get(this.state.sort).value;
    const sign = this.state.down ? -1 : 1;
    const known = (key) => key !== null && key !== undefined;
    const keys = new Map(kept.map((place) => [place, value(place)]));
    return kept.sort((a, b) => {
      const [first, second] = [keys.get(a), keys.get(b)];
      if (!known(first) || !known(second)) return known(second) - known(first) || a - b; // without a value: last
      const order = typeof first === "string" ? first.localeCompare(second) : first - second;
      return sign * order || this.name(a).localeCompare(this.name(b)) || a - b;
    });
  },

  name(place) {
    return data.index.variants[data.index.rows.variant[place]];
  },

  filter() {
    const { index, state } = { index: data.index, state: this.state };
    const sought = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const prompts = index.prompts.map((prompt) => (prompt ?? "").toLowerCase());
    const references = index.referenceNames.map((name) => (name ?? "").toLowerCase());
    const quantity = quantities().get(state.by)?.value;
    const [from, to] = [bound(state.from, -Infinity), bound(state.to, Infinity)];
    return (place) => {
      const of = (column) => index.rows[column][place];
      if (state.method && this.name(place) !== state.method) return false;
      if (state.status && index.statuses[of("status")] !== state.status) return false;
      if (state.category && index.categories[of("category")] !== state.category) return false;
      const texts = [prompts[of("prompt")], references[of("reference")]];
      const found = (word) => texts.some((text) => text.includes(word)) || (word.length >= 8 && of("id").startsWith(word));
      if (!sought.every(found)) return false;
      if (!quantity || (from === -Infinity && to === Infinity)) return true;
      const value = quantity(place);
      return value !== null && from <= value && value <= to;
    };
  },
};

function bound(text, otherwise) {
  const value = Number.parseFloat(text);
  return Number.isFinite(value) ? value : otherwise;
}

// What can be filtered by a range, by name.
function quantities() {
  const { rows, figures, measured } = data.index;
  const found = new Map();
  if (rows.loss_final.some((loss) => loss !== null)) {
    found.set("loss_final", { label: "final loss", value: (place) => rows.loss_final[place] });
    found.set("loss_first", { label: "first loss", value: (place) => rows.loss_first[place] });
    found.set("loss_ratio", { label: "loss, final / first", value: lossRatio });
  }
  figures.forEach((figure, n) => {
    found.set(`metric:${figure.name}`, { label: words(figure.name), value: (place) => measured[n][place] });
  });
  found.set("seconds", { label: "seconds", value: (place) => rows.seconds[place] });
  return found;
}

function lossRatio(place) {
  const { loss_first: first, loss_final: final } = data.index.rows;
  return first[place] ? final[place] / first[place] : null;
}

// What can be sorted by, by name. `pair` puts the methods of one reference and prompt beside each other.
function orders() {
  const { rows, prompts, categories, statuses } = data.index;
  return new Map([
    ["pair", { label: "reference and prompt", value: (place) => rows.pair[place] }],
    ["method", { label: "method", value: (place) => view.name(place) }],
    ["prompt", { label: "prompt", value: (place) => prompts[rows.prompt[place]] }],
    ["category", { label: "category", value: (place) => categories[rows.category[place]] }],
    ["status", { label: "status", value: (place) => statuses[rows.status[place]] }],
    ["ended", { label: "time of ending", value: (place) => place }],
    ...quantities(),
  ]);
}
