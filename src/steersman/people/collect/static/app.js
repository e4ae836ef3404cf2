// Keys, marks, and forms that are sent without leaving the page. Without this script the forms still work.
"use strict";

const opened = performance.now();
const status = document.getElementById("status");
// A form counts only when its page was on the screen for half a second: systems take a second click within that time
// for part of a double click, and so it is of the press that brought the page, and not about what the page shows.
const SETTLES = 500;
requestAnimationFrame(() => setTimeout(() => { document.body.dataset.settled = "1"; }, SETTLES));
let sending = false;
let refused = false;
let leaving = null;

// What is typed outlives its page: in this tab it stands in its field again when the page comes back, as it does behind
// a thumb or "Undo", until its own form is stored. Logging out forgets it.
const place = (field) => `${field.form.action} ${field.name}`;
for (const field of document.querySelectorAll("main form textarea")) {
  const kept = sessionStorage.getItem(place(field));
  if (kept === null) continue;
  field.value = kept;
  const folded = field.closest("details");
  if (folded) folded.open = true;
}
function keep(field) {
  if (field.value === field.defaultValue) sessionStorage.removeItem(place(field));
  else sessionStorage.setItem(place(field), field.value);
}
const forget = (form) => form.querySelectorAll("textarea").forEach((field) => sessionStorage.removeItem(place(field)));
document.addEventListener("input", ({ target }) => {
  if (target.matches("main form textarea")) keep(target);
});

// A key presses the button that shows it, but not while something is typed, and once however long it is held.
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea, select, input:not([type=radio], [type=checkbox])");
  if (event.repeat && !typing) {
    if (event.key === "Enter") event.preventDefault();
    return;
  }
  if (event.key === "Enter" && event.target.matches("input") && saysWhat(event.target.form)) event.preventDefault();
  if (event.key === "Enter" && event.ctrlKey) {
    const form = event.target.form || document.querySelector("form.verdict");
    const button = form && form.querySelector('button:not([type="button"], [name])');  // no verdict, and no label
    if (button && !event.repeat) form.requestSubmit(button);
    return;
  }
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (/^[1-9]$/.test(event.key) && answersOpen(Number(event.key))) return;
  const found = document.querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (found) {
    event.preventDefault();
    found.click();
  }
});

// Enter in a field presses the first button of its form. Where that button is one verdict of several, as "Good answer"
// beside "Bad answer", nobody has said it.
function saysWhat(form) {
  const first = form && form.querySelector("button:not([type=button])");
  return first && first.name !== "";
}

// The number answers the first place or attribute that is still open, if there is one.
function answersOpen(number) {
  for (const field of document.querySelectorAll(".verdict fieldset, .verdict .answer select")) {
    if (field.matches("select")) {
      if (field.value !== "") continue;
      if (number < field.options.length) field.selectedIndex = number;
    } else {
      const steps = field.querySelectorAll("input");
      if ([...steps].some((step) => step.checked)) continue;
      if (number <= steps.length) steps[number - 1].checked = true;
    }
    return true;
  }
  return false;
}

// Every form tells how long its page was looked at. One is sent at a time: what is pressed meanwhile does nothing.
document.addEventListener("submit", (event) => {
  const form = event.target, button = event.submitter;
  if (form.method !== "post" || form.classList.contains("login")) return;
  if (sending || !document.body.dataset.settled) {
    event.preventDefault();
    return;
  }
  sending = true;
  const seconds = form.querySelector('input[name="seconds"]');
  if (seconds) seconds.value = ((performance.now() - opened) / 1000).toFixed(2);
  if (form.matches('[action="/logout"]')) sessionStorage.clear();
  if (!form.dataset.saved) {  // a message that is on its way is shown by the page that comes next
    leaving = form;
    forget(form);
  }
  if (!form.dataset.saved && !form.dataset.slow) return;
  event.preventDefault();
  status.textContent = form.dataset.slow ? document.body.dataset.thinking : "";
  const data = new URLSearchParams(new FormData(form));
  if (button && button.name) data.set(button.name, button.value);
  send(form, data, 500);
});
window.addEventListener("pageshow", (event) => { if (event.persisted) sending = false; });

// A verdict is sent with its key until it is acknowledged. Whatever else is said of a form leaves the page as it is,
// with what was typed, and tells why.
async function send(form, data, pause) {
  try {
    if (refused) data.set("csrf", await token());
    const answer = await fetch(form.action, { method: "POST", body: data });
    if (answer.status >= 500 || (answer.status === 429 && form.dataset.saved)) throw new Error("again");
    if (answer.redirected) {
      forget(form);
      return arrive(answer.url.split("#")[0], form.dataset.slow);
    }
    refused = true;
    const told = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("error");
    stay(told ? told.textContent : `${answer.status} ${answer.statusText}`);
  } catch {
    if (form.dataset.slow) return stay(document.body.dataset.lost);
    status.textContent = document.body.dataset.retry;
    setTimeout(() => send(form, data, Math.min(pause * 2, 8000)), pause);
  }
}

function stay(why) {
  status.textContent = why;
  status.scrollIntoView({ block: "nearest" });
  sending = false;
  if (leaving) leaving.querySelectorAll("textarea").forEach(keep);
  leaving = null;
}

// Replacing keeps the back button off a page that is judged already; a new turn of a chat is scrolled to.
function arrive(url, slow) {
  if (url !== location.href.split("#")[0]) return location.replace(url);
  history.scrollRestoration = slow ? "manual" : "auto";
  if (slow) history.replaceState(null, "", "#last");
  location.reload();
}

// The token of whoever is logged in now: since this page was loaded it may have become another one.
async function token() {
  const home = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
  return home.querySelector('input[name="csrf"]').value;
}

const MOVES = {
  ArrowLeft: ["left", "character"], ArrowRight: ["right", "character"], ArrowUp: ["backward", "line"],
  ArrowDown: ["forward", "line"], Home: ["backward", "lineboundary"], End: ["forward", "lineboundary"],
};

// Marks: offsets count characters (not UTF-16 units) of the answer's text.
const markable = document.querySelector(".markable");
if (markable) {
  const field = document.querySelector('input[name="spans"]');
  const output = document.getElementById("marks");
  const text = markable.textContent;
  let spans = [];
  const characters = (units) => Array.from(text.slice(0, units)).length;
  const offset = (node, at) => {
    const range = document.createRange();
    range.setStart(markable, 0);
    range.setEnd(node, at);
    return range.toString().length;
  };
  const draw = () => {
    field.value = JSON.stringify(spans);
    const letters = Array.from(text);
    output.textContent = spans.map((s) => `${s.label}: “${letters.slice(s.start, s.end).join("").slice(0, 60)}”`).join("; ");
  };
  document.querySelectorAll("button.label").forEach((button) => {
    button.addEventListener("mousedown", (event) => event.preventDefault());
    button.addEventListener("click", () => {
      const picked = getSelection();
      if (!picked.rangeCount || picked.isCollapsed || !markable.contains(picked.getRangeAt(0).commonAncestorContainer)) {
        status.textContent = document.body.dataset.select;
        return;
      }
      status.textContent = "";
      const range = picked.getRangeAt(0);
      const start = characters(offset(range.startContainer, range.startOffset));
      const end = characters(offset(range.endContainer, range.endOffset));
      spans.push({ start, end, label: button.dataset.label });
      draw();
    });
  });
  // Text that can not be edited has no caret: the arrows move a selection of one letter, which Shift makes longer.
  markable.addEventListener("keydown", (event) => {
    const picked = getSelection();
    if (event.key === "a" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      picked.selectAllChildren(markable);
      return;
    }
    if (!(event.key in MOVES) || event.altKey || event.metaKey) return;
    event.preventDefault();
    const fresh = !picked.rangeCount || !markable.contains(picked.anchorNode) || !markable.contains(picked.focusNode);
    if (fresh) picked.collapse(markable, 0);
    const { anchorNode, anchorOffset, focusNode, focusOffset } = picked;
    const [way, unit] = MOVES[event.key];
    const by = event.ctrlKey && unit === "character" ? "word" : unit;
    if (event.shiftKey) {
      picked.modify("extend", way, by);
    } else {
      if (!picked.isCollapsed) picked.collapseToStart();
      if (!fresh) picked.modify("move", way, by);
      picked.modify("extend", "forward", "character");
    }
    if (!markable.contains(picked.focusNode)) picked.setBaseAndExtent(anchorNode, anchorOffset, focusNode, focusOffset);
  });
  document.querySelector("button.clear").addEventListener("click", () => { spans = []; draw(); });
}
