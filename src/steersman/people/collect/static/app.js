// Keys, marks, and forms that are sent again until the server has them. Without this script the forms still work.
"use strict";

const opened = performance.now();
const status = document.getElementById("status");

// A key presses the button that shows it, but not while something is typed.
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("textarea, select, input:not([type=radio], [type=checkbox])");
  if (event.key === "Enter" && event.ctrlKey) {
    const form = event.target.form || document.querySelector("form.verdict");
    const button = form && form.querySelector("button.primary, button:not([name])");
    if (button) form.requestSubmit(button);
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

// Every form tells how long its page was looked at. Verdicts are sent with their key until they are acknowledged.
document.addEventListener("submit", (event) => {
  const form = event.target, button = event.submitter;
  const seconds = form.querySelector('input[name="seconds"]');
  if (seconds) seconds.value = ((performance.now() - opened) / 1000).toFixed(2);
  if (form.dataset.slow) status.textContent = document.body.dataset.thinking;
  if (!form.dataset.saved) return;
  event.preventDefault();
  if (form.dataset.sending) return;
  form.dataset.sending = "1";
  const data = new URLSearchParams(new FormData(form));
  if (button && button.name) data.set(button.name, button.value);
  send(form, data, 500);
});

async function send(form, data, pause) {
  try {
    const answer = await fetch(form.action, { method: "POST", body: data });
    if (answer.status >= 500 || answer.status === 429) throw new Error("again");
    if (answer.redirected) {
      // Replacing keeps the back button off a page that is judged already.
      if (answer.url.split("#")[0] === location.href.split("#")[0]) location.reload();
      else location.replace(answer.url);
      return;
    }
    document.documentElement.innerHTML = await answer.text();
  } catch {
    status.textContent = document.body.dataset.retry;
    setTimeout(() => send(form, data, Math.min(pause * 2, 8000)), pause);
  }
}

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
  document.querySelector("button.clear").addEventListener("click", () => { spans = []; draw(); });
}
