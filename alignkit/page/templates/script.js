"use strict";
// Everything of the page can be read without this script; it changes the order, the axis and the size.
const find = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`);

function onChoice(name, apply) {
  const update = () => { const box = chosen(name); if (box) apply(box.value); };
  for (const box of document.querySelectorAll(`input[name="${name}"]`)) box.addEventListener("change", update);
  update();
}

onChoice("axis", (axis) => { document.body.dataset.axis = axis; });

onChoice("order", (order) => {
  const grid = find("cards");
  const cards = [...grid.children];
  const rank = (card) => JSON.parse(card.dataset.ranks)[order] ?? Infinity;
  for (const card of cards) card.hidden = rank(card) === Infinity;
  grid.append(...cards.sort((a, b) => rank(a) - rank(b)));
});

const large = find("large");
const slider = find("slider");
let now = null;

function slide() {
  const share = 100 - slider.value;
  find("large-after").style.clipPath = `inset(0 0 0 ${share}%)`;
  find("edge").style.left = `${share}%`;
}

function format(value) {
  return value === undefined ? "n/a" : value.toFixed(3).replace("-", "\u2212");
}

function show(shot) {
  now = shot;
  const alone = !shot.dataset.base && !document.querySelector(`[data-base="${shot.id}"]`);
  const after = shot.dataset.base || alone ? shot : document.querySelector(`[data-base="${shot.id}"]`);
  const before = alone ? shot : find(after.dataset.base);
  for (const [id, from] of [["large-before", before], ["large-after", after]]) {
    const image = from.querySelector("img");
    find(id).src = image ? image.src : shot.querySelector("img").src;
    find(id).classList.toggle("sharp", !image || image.classList.contains("sharp"));
    find(id).alt = from.dataset.label;
  }
  find("large-title").textContent = after.dataset.label;
  find("large-prompt").textContent = shot.closest("figure").querySelector(".prompt").textContent;
  const [first, second] = [before, after].map((one) => JSON.parse(one.dataset.scores));
  find("large-scores").replaceChildren(...[...new Set([...Object.keys(first), ...Object.keys(second)])].map((name) => {
    const row = document.createElement("tr");
    for (const text of [name, format(first[name]), format(second[name])]) {
      const cell = document.createElement("td");
      cell.textContent = text;
      row.append(cell);
    }
    return row;
  }));
  slide();
}

function move(by) {
  const column = now.id.split("-").slice(1).join("-");
  const kind = now.id[0];
  const shots = [...document.querySelectorAll(".shot:enabled")].filter((shot) =>
    shot.id[0] === kind && shot.offsetParent !== null && (kind === "s" || shot.id.endsWith(`-${column}`)));
  const place = shots.indexOf(now) + by;
  if (shots[place]) show(shots[place]);
}

document.addEventListener("click", (event) => {
  const shot = event.target.closest(".shot:enabled");
  if (shot) {
    slider.value = 50;
    show(shot);
    large.showModal();
  } else if (event.target === large) {
    large.close();
  }
});
slider.addEventListener("input", slide);
find("close").addEventListener("click", () => large.close());
find("previous").addEventListener("click", () => move(-1));
find("next").addEventListener("click", () => move(1));
