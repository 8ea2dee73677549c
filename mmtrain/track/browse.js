"use strict";
const byId = (id) => document.getElementById(id);
const list = byId("documents");
const cards = [...list.children];
const searchable = new Map(cards.map((card) => [card,
  [...card.querySelectorAll("h2, .chips, .words, .meta pre")].map((part) => part.textContent).join("\n").toLowerCase()]));
let current = null;

for (const split of new Set(cards.map((card) => card.dataset.split))) byId("split").append(new Option(split, split));

const visible = () => [...list.children].filter((card) => !card.hidden);

function count() {
  const shown = visible();
  const place = shown.indexOf(current) + 1;
  byId("count").textContent = (place ? place + " / " : "") + shown.length + (shown.length < cards.length ? " of " + cards.length : "");
  byId("nothing").hidden = shown.length > 0;
}

function filter() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kind = byId("kind").value, split = byId("split").value;
  for (const card of cards) {
    const text = searchable.get(card);
    card.hidden = (kind && card.dataset.kind !== kind) || (split && card.dataset.split !== split)
      || !words.every((word) => text.includes(word));
  }
  count();
}

function order() {
  const key = byId("order").value;
  const sorted = key ? [...cards].sort((a, b) => b.dataset[key] - a.dataset[key]) : cards;
  list.append(...sorted);
  count();
}

function move(step) {
  const shown = visible();
  if (!shown.length) return;
  const place = shown.indexOf(current);
  const next = place < 0 ? (step > 0 ? 0 : shown.length - 1) : Math.min(Math.max(place + step, 0), shown.length - 1);
  if (current) current.classList.remove("current");
  current = shown[next];
  current.classList.add("current");
  current.scrollIntoView();
  current.focus({ preventScroll: true });
  count();
}

// Thousands of elements per document: only those of the texts in sight are made.
function draw(pieces) {
  if (pieces.childElementCount) return;
  const ids = pieces.dataset.ids.split(" ");
  let place = Number(pieces.dataset.first);
  const blocks = pieces.dataset.pieces.split("\n").map((piece, i) => {
    const own = ids[i].split("+");
    const block = document.createElement("span");
    block.textContent = piece.replaceAll("\u21b5", "\u21b5\n");
    block.title = own.length > 1 ? `tokens ${place}\u2013${place + own.length - 1}: ids ${own.join(", ")}` : `token ${place}: id ${own[0]}`;
    if (own.length > 1) block.className = "several";
    place += own.length;
    return block;
  });
  pieces.append(...blocks);
}

function clamp(words) {
  if (words.dataset.measured || !words.clientHeight) return;
  words.dataset.measured = "yes";
  words.classList.add("long");
  if (words.scrollHeight <= words.clientHeight + 40) return void words.classList.remove("long");
  const more = document.createElement("button");
  more.type = "button";
  more.className = "more";
  more.textContent = "show all";
  more.addEventListener("click", () => { more.textContent = words.classList.toggle("long") ? "show all" : "show less"; });
  words.parentElement.append(more);
}

const inSight = new Set();
function complete(segment) {
  for (const words of segment.querySelectorAll(".words")) clamp(words);
  const pieces = segment.querySelector(".pieces");
  if (pieces && document.body.classList.contains("tokens")) draw(pieces);
}
const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) { inSight.add(target); complete(target); } else inSight.delete(target);
  }
}, { rootMargin: "600px" });
for (const segment of document.querySelectorAll(".segment.text")) observer.observe(segment);

function showTokens() {
  document.body.classList.toggle("tokens", byId("pieces").checked);
  inSight.forEach(complete);
}

function fold() {
  const all = [...document.querySelectorAll(".document")];
  const open = !all.some((each) => each.open);
  for (const each of all) each.open = open;
  byId("fold").textContent = open ? "fold all" : "unfold all";
}

function nameCode(event) {
  const map = event.target;
  if (!map.matches || !map.matches("img[data-map]")) return;
  const figure = map.closest("figure");
  const rows = figure.querySelector("pre").textContent.split("\n").map((row) => row.split(" "));
  const y = Math.min(Math.floor(event.offsetY / map.clientHeight * rows.length), rows.length - 1);
  const x = Math.min(Math.floor(event.offsetX / map.clientWidth * rows[0].length), rows[0].length - 1);
  if (y >= 0 && x >= 0) figure.querySelector(".code").textContent = `row ${y}, column ${x}: code ${rows[y][x]}`;
}

const actions = { j: () => move(1), n: () => move(1), k: () => move(-1), p: () => move(-1), f: fold,
  "/": () => byId("search").focus(), t: () => { byId("pieces").checked = !byId("pieces").checked; showTokens(); } };
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") return document.activeElement.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=search], select")) return;
  if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
});
document.addEventListener("mousemove", nameCode);
document.addEventListener("click", (event) => {
  if (event.target.matches(".segment img:not([data-map])")) event.target.classList.toggle("large");
});
byId("toolbar").addEventListener("submit", (event) => event.preventDefault());
byId("search").addEventListener("input", filter);
for (const id of ["kind", "split"]) byId(id).addEventListener("change", filter);
byId("order").addEventListener("change", order);
byId("pieces").addEventListener("change", showTokens);
byId("fold").addEventListener("click", fold);
byId("next").addEventListener("click", () => move(1));
byId("previous").addEventListener("click", () => move(-1));
document.body.classList.toggle("tokens", byId("pieces").checked);
filter();
