(() => {
  // a browser draws few figures with the graphics card at once; markers that are few need it not
  const FEW_MARKERS = 12000; // characters of the base64 text of their positions
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const wishes = matchMedia("(prefers-color-scheme: dark)");

  function onDark(light, changes) {
    const figure = structuredClone(light);
    for (const [path, value] of changes) {
      const last = path.at(-1);
      path.slice(0, -1).reduce((part, name) => part[name], figure)[last] = value;
    }
    return figure;
  }

  function lighten(figure) {
    // a box that is drawn here leads nowhere
    if (figure.layout.dragmode === "select") figure.layout.dragmode = "zoom";
    for (const trace of figure.data) {
      const x = trace.x ?? [];
      const size = x.bdata ? x.bdata.length : x.length * 8;
      if (trace.type === "scattergl" && size <= FEW_MARKERS) trace.type = "scatter";
    }
    return figure;
  }

  const plots = [...document.querySelectorAll("figure")].map((figure) => {
    const { light, changes } = JSON.parse(figure.querySelector("script").textContent);
    const figures = { light: lighten(light), dark: lighten(onDark(light, changes)) };
    const heavy = light.data.some((trace) => trace.type.endsWith("gl"));
    return { place: figure.querySelector(".plot"), figures, heavy, near: false };
  });

  function saver(format) {
    return {
      name: `Save as ${format.toUpperCase()}`,
      icon: Plotly.Icons[format === "png" ? "camera" : "disk"],
      click: (plot) => Plotly.downloadImage(plot, {
        format, scale: 2, filename: "figure",
        width: plot.clientWidth, height: plot.clientHeight,
      }),
    };
  }

  const config = {
    displaylogo: false,
    responsive: true,
    modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d"],
    modeBarButtonsToAdd: [saver("png"), saver("svg")],
  };

  function draw({ place, figures }) {
    const { data, layout } = figures[root.dataset.theme];
    Plotly.react(place, structuredClone(data), structuredClone(layout), config);
  }

  // figures are drawn when the reader comes near them
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const plot = plots.find(({ place }) => place === target);
      if (isIntersecting && !plot.near) draw(plot);
      if (!isIntersecting && plot.near && plot.heavy) Plotly.purge(plot.place);
      plot.near = isIntersecting || (plot.near && !plot.heavy);
    }
  }, { rootMargin: "400px" });

  function show(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    button.textContent = dark ? "Light" : "Dark";
    button.setAttribute("aria-pressed", String(dark));
    plots.filter(({ near }) => near).forEach(draw);
  }

  button.addEventListener("click", () => show(root.dataset.theme !== "dark"));
  wishes.addEventListener("change", (event) => show(event.matches));
  addEventListener("beforeprint", () => plots.filter(({ near }) => !near).forEach(draw));
  show(wishes.matches);
  plots.forEach(({ place }) => observer.observe(place));
})();
