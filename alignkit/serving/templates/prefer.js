"use strict";
const find = (id) => document.getElementById(id);
const keys = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", s: "skip", u: "undo" };
let pair = null, last = null, session = null, busy = true;

async function request(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ protocol: Number(document.body.dataset.protocol), session, ...body }),
  };
  const response = await fetch(path, options);
  const found = await response.json();
  if (!response.ok) throw new Error(found.error);
  return found;
}

function notice(text, bad = false) {
  find("notice").textContent = text;
  find("notice").classList.toggle("bad", bad);
}

/* Decode both images before either is shown, so that the eye never compares images of two pairs. */
async function draw(shown) {
  if (shown) {
    const sides = await Promise.all(["left", "right"].map(async (side) => {
      const image = new Image();
      image.src = `data:image/png;base64,${shown[side]}`;
      await image.decode();
      return [find(side), image];
    }));
    for (const [element, image] of sides) {
      element.src = image.src;
      element.classList.toggle("sharp", image.naturalWidth < 200);
    }
    find("prompt").textContent = shown.text;
    find("prompt").scrollTop = 0;
  }
  pair = shown;
}

async function show(state) {
  await draw(state.pair);
  last = state.last;
  session = state.session;
  const finished = state.done === state.total;
  find("progress").max = state.total;
  find("progress").value = state.done;
  find("place").textContent = finished ? `${state.total} of ${state.total}` : `${state.done + 1} of ${state.total}`;
  find("summary").textContent = finished || !state.done ? "" : state.summary;
  find("question").hidden = !pair;
  document.querySelectorAll(".other [data-answer]").forEach((element) => { element.hidden = !pair; });
  find("finished").hidden = !finished;
  find("result").textContent = state.summary;
  find("next").hidden = !state.command;
  find("command").textContent = state.command;
  find("undo").disabled = !last;
  document.querySelectorAll(".chosen").forEach((element) => element.classList.remove("chosen"));
  if (!pair && !finished) notice("Images are being generated ...");
  return pair || finished;
}

/* Fetch the state until there is something to answer; the server holds the request while images are generated. */
async function wait(reason = "") {
  for (;;) {
    try {
      if (await show(await request("/state"))) break;
    } catch {
      notice("alignkit prefer does not respond. Start it again in the terminal; all answers are kept.", true);
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  notice(reason, true);
  busy = false;
}

async function send(path, body) {
  if (busy || !body.pair) return;
  busy = true;
  let reason = "";
  try {
    notice("");
    if (await show(await request(path, body))) {
      busy = false;
      return;
    }
  } catch (error) {
    reason = error instanceof TypeError ? "" : error.message;  // a TypeError is a server that does not respond
  }
  await wait(reason);
}

function act(what) {
  if (what === "undo") return send("/undo", { pair: last });
  if (!busy && pair) document.querySelector(`.image[data-answer="${what}"]`)?.classList.add("chosen");
  return send("/answer", { pair: pair?.name, answer: what });
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) act(button.dataset.answer || button.id);
});
document.addEventListener("keydown", (event) => {
  const what = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!what || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (!event.repeat) act(what);
});
wait();
