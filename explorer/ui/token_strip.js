const STEP_DELAY = 220; // ms: stepping with the arrow keys asks the server once, at the end

function buildLegend(element, { legend, generated, found }) {
  const parts = [];
  const title = document.createElement("span");
  title.textContent = legend.title;
  parts.push(title);
  if (legend.swatches.length) {
    for (const [colour, label] of legend.swatches) {
      const item = document.createElement("span");
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.borderColor = colour;
      swatch.style.background = `color-mix(in srgb, ${colour} 42%, transparent)`;
      item.append(swatch, document.createTextNode(label));
      parts.push(item);
    }
  } else if (legend.high) {
    const scale = document.createElement("span");
    scale.className = "scale";
    const ramp = document.createElement("span");
    ramp.className = "ramp";
    scale.append(legend.low, ramp, legend.high);
    parts.push(scale);
  }
  for (const [flags, name, words] of [
    [generated, "generated", "written by the model"],
    [found, "found", "searched for"],
  ]) {
    if (!flags.includes(true)) continue;
    const sign = document.createElement("span");
    sign.className = name;
    sign.textContent = words;
    parts.push(sign);
  }
  element.replaceChildren(...parts);
}

function buildTokens(strip, data) {
  const tokens = data.texts.map((text, i) => {
    const token = document.createElement("span");
    token.className = "token";
    token.textContent = text;
    token.title = data.hints[i];
    token.dataset.index = i;
    token.tabIndex = -1;
    token.setAttribute("role", "button");
    token.setAttribute("aria-label", `${text.trim()}: ${data.hints[i]}`);
    token.classList.toggle("muted", data.muted[i]);
    token.classList.toggle("generated", data.generated[i]);
    token.classList.toggle("found", data.found[i]);
    if (data.levels[i] === null) token.classList.add("unknown");
    else token.style.setProperty("--level", data.levels[i]);
    if (data.hues[i]) token.style.setProperty("--hue", data.hues[i]);
    if (data.marks[i]) {
      token.dataset.mark = data.marks[i];
      // behind a line break the mark would stand at the next token
      token.classList.toggle("breaks", text.endsWith("\n"));
    }
    return token;
  });
  strip.setAttribute("aria-label", data.label);
  strip.replaceChildren(...tokens);
}

// the token on the line above or below whose middle is nearest
function acrossLines(tokens, from, down) {
  const here = tokens[from].getBoundingClientRect();
  const middle = (here.left + here.right) / 2;
  let best = from, bestDistance = Infinity, line = null;
  for (let i = from + (down ? 1 : -1); i >= 0 && i < tokens.length; i += down ? 1 : -1) {
    const rect = tokens[i].getBoundingClientRect();
    if (Math.abs(rect.top - here.top) < 4) continue;
    if (line === null) line = rect.top;
    if (Math.abs(rect.top - line) >= 4) break;
    const distance = Math.abs((rect.left + rect.right) / 2 - middle);
    if (distance < bestDistance) { best = i; bestDistance = distance; }
  }
  return best;
}

function target(strip, key, from) {
  const tokens = strip.children;
  const backwards = getComputedStyle(strip).direction === "rtl" ? "ArrowRight" : "ArrowLeft";
  switch (key) {
    case "ArrowLeft": case "ArrowRight":
      return Math.min(tokens.length - 1, Math.max(0, from + (key === backwards ? -1 : 1)));
    case "ArrowUp": return acrossLines(tokens, from, false);
    case "ArrowDown": return acrossLines(tokens, from, true);
    case "Home": return 0;
    case "End": return tokens.length - 1;
    default: return null;
  }
}

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const strip = parentElement.querySelector(".strip");
  const fresh = strip.dataset.signature !== data.signature;
  if (fresh) {
    strip.dataset.signature = data.signature;
    buildLegend(parentElement.querySelector(".legend"), data);
    buildTokens(strip, data);
  }
  const chosen = data.ids.indexOf(data.selected);
  Array.from(strip.children).forEach((token, i) => {
    token.setAttribute("aria-pressed", i === chosen);
    token.tabIndex = i === Math.max(chosen, 0) ? 0 : -1;
  });
  if (chosen >= 0) {
    const token = strip.children[chosen];
    const outer = strip.getBoundingClientRect(), inner = token.getBoundingClientRect();
    if (inner.top < outer.top || inner.bottom > outer.bottom) {
      strip.scrollTop += inner.top - outer.top - strip.clientHeight / 3;
    }
  }
  if (data.reveal && strip.dataset.reveal !== data.reveal) {
    strip.dataset.reveal = data.reveal;
    // what is drawn above may still change its height
    setTimeout(() => {
      parentElement.querySelector(".legend").scrollIntoView({ block: "start" });
      if (chosen >= 0) strip.children[chosen].focus({ preventScroll: true });
    }, 150);
  }
  const pick = (index) => setTriggerValue("pick", data.ids[index]);
  const indexOf = (event) => {
    const token = event.target.closest(".token");
    return token ? Number(token.dataset.index) : null;
  };
  strip.onclick = (event) => {
    const index = indexOf(event);
    if (index !== null) { strip.children[index].focus(); pick(index); }
  };
  strip.onkeydown = (event) => {
    const index = indexOf(event);
    if (index === null) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pick(index);
      return;
    }
    const next = target(strip, event.key, index);
    if (next === null) return;
    event.preventDefault();
    strip.children[index].tabIndex = -1;
    strip.children[next].tabIndex = 0;
    strip.children[next].focus();
    clearTimeout(strip.stepTimer);
    strip.stepTimer = setTimeout(() => pick(next), STEP_DELAY);
  };
}
