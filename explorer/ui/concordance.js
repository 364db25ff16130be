function cell(row, className, text, inner) {
  const element = document.createElement("span");
  element.className = className;
  element.dir = "auto";
  if (inner) {
    const span = document.createElement("span");
    span.textContent = text;
    element.appendChild(span);
  } else {
    element.textContent = text;
  }
  row.appendChild(element);
}

function buildRow([before, token, after, note, share, figure], index) {
  const row = document.createElement("div");
  row.className = "row";
  row.dataset.index = index;
  row.tabIndex = index === 0 ? 0 : -1;
  row.setAttribute("role", "button");
  row.setAttribute("aria-label", `${token}, weight ${figure}, ${note}: ${before}${token}${after}`);
  cell(row, "before", before, true);
  cell(row, "token", token);
  cell(row, "after", after);
  cell(row, "note", note);
  const amount = document.createElement("span");
  amount.className = "amount";
  const track = document.createElement("span");
  track.className = "track";
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.style.width = `${Math.round(share * 100)}%`;
  track.appendChild(bar);
  const number = document.createElement("span");
  number.className = "figure";
  number.textContent = figure;
  amount.append(track, number);
  row.appendChild(amount);
  return row;
}

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const rows = parentElement.querySelector(".rows");
  const signature = JSON.stringify(data);
  if (rows.signature !== signature) {
    rows.signature = signature;
    rows.setAttribute("aria-label", data.label);
    rows.replaceChildren(...data.rows.map(buildRow));
  }
  const indexOf = (event) => {
    const row = event.target.closest(".row");
    return row ? Number(row.dataset.index) : null;
  };
  rows.onclick = (event) => {
    const index = indexOf(event);
    if (index !== null) setTriggerValue("pick", index);
  };
  rows.onkeydown = (event) => {
    const index = indexOf(event);
    if (index === null) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      setTriggerValue("pick", index);
    } else if (step && rows.children[index + step]) {
      event.preventDefault();
      rows.children[index].tabIndex = -1;
      rows.children[index + step].tabIndex = 0;
      rows.children[index + step].focus();
    }
  };
}
