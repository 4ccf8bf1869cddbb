"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function look() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue("--" + name).trim();
  const axis = {
    gridcolor: colour("grid"), linecolor: colour("grid"), zerolinecolor: colour("grid"),
    tickcolor: colour("grid"),
  };
  return {
    layout: {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("text"), family: "system-ui, sans-serif", size: 13 },
      colorway: [1, 2, 3, 4, 5].map((i) => colour("colour-" + i)),
      xaxis: axis, yaxis: axis,
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("grid"), font: { color: colour("text") } },
    },
    data: {
      scatter: [{ marker: { size: 8 } }], box: [{ marker: { size: 6, color: colour("colour-1") } }],
      heatmap: [{ colorscale: [[0, colour("card")], [1, colour("colour-1")]] }],
    },
  };
}

function draw() {
  const template = look();
  for (const [number, figure] of charts.entries()) {
    const layout = {
      margin: { l: 12, r: 12, t: 12, b: 12 }, height: 330,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
      ...figure.layout, template,
    };
    Plotly.react("chart-" + number, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

draw();
dark.addEventListener("change", draw);
for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
  window.addEventListener(event, () => {
    document.documentElement.classList.toggle("paper", printing);
    draw();
  });
}
