"use strict";
// The page: controls to state, state to cards.

const page = {
  cards: new Map(), // element -> Card
  shown: 0, // number of the latest view, so that one that loads late is not shown over a newer one
  playing: false,
  near: null,
};

function start() {
  drawStatuses();
  drawCharts();
  fillControls();
  page.near = new IntersectionObserver(onNear, { rootMargin: "300px 0px" });
  if (matchMedia("(max-width: 640px)").matches) byId("summary").open = false;
  addEventListener("hashchange", show);
  // Whoever opens a shared view wants to see its rows.
  const narrowed = (name) => name !== "arrows" && view.state[name] !== DEFAULTS[name];
  show().then(() => Object.keys(DEFAULTS).some(narrowed) && byId("controls").scrollIntoView());
}

function fillControls() {
  const { index } = data;
  const choices = (id, list, every) => {
    const options = list.map(([value, label]) => new Option(label, value));
    byId(id).replaceChildren(...(every === null ? [] : [new Option(every, "")]), ...options);
  };
  const named = (names) => names.filter(Boolean).sort().map((name) => [name, name]);
  const labelled = (found) => [...found].map(([name, { label }]) => [name, label]);
  choices("method", named(index.variants), "all");
  choices("category", named(index.categories), "all");
  choices("status", named(index.statuses), "all");
  choices("by", labelled(quantities()), "no range");
  choices("sort", labelled(orders()), null);
  byId("category-label").hidden = !index.categories.some(Boolean);
  for (const id of ["method", "category", "status", "by", "sort"]) byId(id).onchange = () => view.change({ [id]: byId(id).value });
  for (const id of ["q", "from", "to"]) byId(id).oninput = () => view.change({ [id]: byId(id).value }, true);
  document.querySelector(".skip").onclick = (event) => {
    event.preventDefault(); // the hash is the view's
    byId("rows").focus();
  };
  byId("controls").onsubmit = (event) => event.preventDefault();
  byId("down").onclick = () => view.change({ down: view.state.down ? "" : "1" });
  byId("arrows").onclick = () => view.change({ arrows: view.state.arrows ? "" : "1", page: view.state.page }, true);
  byId("reset").onclick = () => view.change(DEFAULTS);
  byId("play").onclick = () => playAll(!page.playing);
  for (const button of document.querySelectorAll(".previous")) button.onclick = () => turn(-1);
  for (const button of document.querySelectorAll(".next")) button.onclick = () => turn(1);
}

function turn(by) {
  view.change({ page: String(Number(view.state.page) + by) });
  byId("rows").scrollIntoView({ block: "start" });
}

async function show() {
  const before = JSON.stringify({ ...view.state, arrows: "" });
  view.read();
  showControls();
  if (page.cards.size && before === JSON.stringify({ ...view.state, arrows: "" })) return showArrows();
  const number = (page.shown += 1);
  const places = view.places();
  const pages = Math.max(1, Math.ceil(places.length / CARDS_PER_PAGE));
  const current = Math.min(Number(view.state.page), pages);
  const first = (current - 1) * CARDS_PER_PAGE;
  const chosen = places.slice(first, first + CARDS_PER_PAGE);
  try {
    const rows = await data.rows(chosen);
    if (number !== page.shown) return;
    showCards(rows.map((row, n) => new Card(row, chosen[n])));
    byId("found").textContent = told(places.length, first, chosen.length);
  } catch (error) {
    if (number === page.shown) byId("found").textContent = error.message;
  }
  showPager(current, pages);
}

function told(found, first, shown) {
  const all = data.index.rows.id.length;
  if (!found) return `No row of ${all.toLocaleString("en")} matches. Widen the filters, or reset them.`;
  const which = found === all ? `${all.toLocaleString("en")} rows` : `${found.toLocaleString("en")} of ${all.toLocaleString("en")} rows`;
  return shown === found ? which : `${which}, ${(first + 1).toLocaleString("en")} to ${(first + shown).toLocaleString("en")} shown`;
}

function showControls() {
  const { state } = view;
  for (const id of ["q", "method", "category", "status", "by", "from", "to", "sort"]) {
    if (byId(id).value !== state[id]) byId(id).value = state[id];
  }
  for (const id of ["from", "to"]) byId(id).disabled = !state.by;
  byId("down").setAttribute("aria-pressed", String(Boolean(state.down)));
  byId("down").textContent = state.down ? "↓" : "↑";
  byId("down").setAttribute("aria-label", state.down ? "Largest first" : "Smallest first");
  byId("arrows").setAttribute("aria-pressed", String(Boolean(state.arrows)));
  for (const button of byId("statuses").children) button.setAttribute("aria-pressed", String(button.dataset.status === state.status));
}

function showPager(current, pages) {
  for (const nav of document.querySelectorAll(".pager")) nav.hidden = pages === 1;
  for (const text of document.querySelectorAll(".page")) text.textContent = `${current} / ${pages}`;
  for (const button of document.querySelectorAll(".previous")) button.disabled = current <= 1;
  for (const button of document.querySelectorAll(".next")) button.disabled = current >= pages;
}

function showCards(cards) {
  page.near.disconnect();
  for (const card of page.cards.values()) card.player?.detach();
  page.cards = new Map(cards.map((card) => [card.element, card]));
  byId("cards").replaceChildren(...page.cards.keys());
  for (const element of page.cards.keys()) page.near.observe(element);
  showArrows();
}

function onNear(entries) {
  for (const { target, isIntersecting } of entries) {
    const player = page.cards.get(target)?.player;
    if (!player) continue;
    if (!isIntersecting) player.detach();
    else {
      player.attach();
      if (page.playing) player.play();
    }
  }
}

function showArrows() {
  for (const card of page.cards.values()) card.showArrows(Boolean(view.state.arrows));
}

function playAll(on) {
  page.playing = on;
  byId("play").setAttribute("aria-pressed", String(on));
  byId("play").textContent = on ? "Pause all" : "Play all";
  for (const { player } of page.cards.values()) {
    if (!player) continue;
    if (on) player.play();
    else player.pause();
  }
}
