// The map of the explorer: points on a canvas, a colour bar, lasso, box, move and zoom. Coordinates are in [0, 1].
const HEIGHT = 520, BAR = 74, NEAR = 7;

const typed = (Kind, view) => new Kind(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

function densityPicture(grid) {
  const side = Math.sqrt(grid.length), picture = new OffscreenCanvas(side || 1, side || 1);
  const pen = picture.getContext("2d"), image = pen.createImageData(side || 1, side || 1);
  grid.forEach((value, i) => image.data.set([120, 130, 140, value], 4 * i));
  pen.putImageData(image, 0, 0);
  return picture;
}

function render({ model, el }) {
  const canvas = el.appendChild(document.createElement("canvas"));
  const tip = el.appendChild(document.createElement("div"));
  const pen = canvas.getContext("2d");
  const points = typed(Float32Array, model.get("points")), names = typed(Int32Array, model.get("names"));
  const count = points.length / 2, density = densityPicture(typed(Uint8Array, model.get("density")));
  const colours = model.get("palette");
  let left = 0, bottom = 0, size = 1, width = 0, due = false;
  let drag = null; // {from: [x, y], path: [[x, y], …]} while a button is down
  let values, span, chosen;

  el.style.position = "relative";
  canvas.style.cssText = "display: block; touch-action: none";
  canvas.setAttribute("role", "img");
  tip.style.cssText = "position: absolute; display: none; pointer-events: none; padding: 2px 6px; font-size: 12px;"
    + "background: #22313f; color: white; border-radius: 3px; white-space: nowrap";

  const across = (x) => ((x - left) / size) * width, down = (y) => HEIGHT - ((y - bottom) / size) * HEIGHT;
  const place = (e) => [left + (e.offsetX / width) * size, bottom + ((HEIGHT - e.offsetY) / HEIGHT) * size];
  const outline = (corners) => {
    const path = new Path2D();
    corners.forEach(([x, y]) => path.lineTo(x, y));
    path.closePath();
    return path;
  };
  const later = () => { if (!due) { due = true; requestAnimationFrame(paint); } };

  function choose() {
    const marks = typed(Uint8Array, model.get("chosen"));
    chosen = marks.length ? marks : null;
    later();
  }

  function recolour() {
    values = typed(Float32Array, model.get("values"));
    span = model.get("span");
    canvas.setAttribute("aria-label", model.get("alt"));
    later();
  }

  function paint() {
    due = false;
    const scale = window.devicePixelRatio || 1, full = el.clientWidth;
    if (!full) return; // not on the page yet
    width = full - BAR;
    if (canvas.width !== Math.round(full * scale)) {
      [canvas.width, canvas.height] = [Math.round(full * scale), HEIGHT * scale];
      canvas.style.width = full + "px";
    }
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.fillStyle = "white";
    pen.fillRect(0, 0, full, HEIGHT);
    pen.fillStyle = "#eef1f3"; // the middle of the colour scale is white
    pen.fillRect(0, 0, width, HEIGHT);
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, width, HEIGHT);
    pen.clip();
    pen.drawImage(density, across(0), down(1), width / size, HEIGHT / size);
    const last = colours.length - 1, dot = count > 5000 ? 2.4 : 5;
    const groups = colours.map(() => []);
    for (let i = 0; i < count; i++)
      groups[Math.max(0, Math.min(last, Math.round((values[i] / span + 1) * last / 2)))].push(i);
    for (const on of chosen ? [0, 1] : [1]) {
      pen.globalAlpha = on ? 0.9 : 0.15;
      groups.forEach((group, c) => {
        pen.fillStyle = colours[c];
        for (const i of group)
          if (!chosen || chosen[i] === on)
            pen.fillRect(across(points[2 * i]) - dot / 2, down(points[2 * i + 1]) - dot / 2, dot, dot);
      });
    }
    pen.globalAlpha = 1;
    pen.strokeStyle = "#22313f";
    pen.setLineDash([4, 3]);
    for (const corners of [...model.get("regions"), ...(drag?.path ? [drag.path] : [])])
      pen.stroke(outline(corners.map(([x, y]) => [across(x), down(y)])));
    pen.restore();
    const tall = (HEIGHT - 80) / colours.length;
    colours.forEach((colour, c) => {
      pen.fillStyle = colour;
      pen.fillRect(width + 14, HEIGHT - 40 - (c + 1) * tall, 16, tall + 0.5);
    });
    pen.fillStyle = "#22313f";
    pen.font = "12px system-ui, sans-serif";
    pen.fillText(model.get("caption"), 8, 18);
    pen.fillText("S_p", width + 14, 28);
    [[-span, HEIGHT - 40], [0, HEIGHT / 2 + 4], [span, 48]].forEach(([v, y]) => pen.fillText(v.toFixed(1), width + 36, y));
  }

  canvas.onpointerdown = (e) => {
    if (e.button || e.offsetX > width) return;
    canvas.setPointerCapture(e.pointerId);
    drag = { from: place(e), path: model.get("tool") === "move" ? null : [place(e)] };
  };
  canvas.onpointermove = (e) => {
    const [x, y] = place(e);
    if (drag?.path) {
      const [a, b] = drag.from;
      drag.path = model.get("tool") === "box" ? [[a, b], [x, b], [x, y], [a, y]] : [...drag.path, [x, y]];
    } else if (drag) [left, bottom] = [left + drag.from[0] - x, bottom + drag.from[1] - y];
    if (drag) return later();
    let best = -1, least = NEAR * NEAR;
    for (let i = 0; i < count; i++) {
      const far = (across(points[2 * i]) - e.offsetX) ** 2 + (down(points[2 * i + 1]) - e.offsetY) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    tip.style.display = best < 0 ? "none" : "block";
    if (best < 0) return;
    const [layer, neuron, cluster] = names.subarray(3 * best, 3 * best + 3);
    tip.textContent = `layer ${layer}, neuron ${neuron}, cluster ${cluster}, S_p ${values[best].toFixed(2)}`;
    tip.style.left = Math.min(e.offsetX + 12, width - 220) + "px";
    tip.style.top = e.offsetY + 12 + "px";
  };
  canvas.onpointerup = (e) => {
    if (drag?.path?.length > 2) {
      model.set("regions", [...(e.shiftKey ? model.get("regions") : []), drag.path]);
      model.save_changes();
    }
    drag = null;
    later();
  };
  canvas.onpointerleave = () => { tip.style.display = "none"; };
  canvas.ondblclick = () => { // all of the map again, or nothing chosen
    if (model.get("tool") === "move") {
      [left, bottom, size] = [0, 0, 1];
      return later();
    }
    model.set("regions", []);
    model.save_changes();
  };
  canvas.onwheel = (e) => {
    if (model.get("tool") !== "move") return; // else the wheel scrolls the notebook
    e.preventDefault();
    const [x, y] = place(e), factor = Math.exp(e.deltaY / 500);
    [left, bottom, size] = [x + (left - x) * factor, y + (bottom - y) * factor, size * factor];
    later();
  };

  const watcher = new ResizeObserver(later);
  watcher.observe(el);
  model.on("change:values", recolour);
  model.on("change:regions", later);
  model.on("change:chosen", choose);
  recolour();
  choose();
  return () => {
    watcher.disconnect();
    model.off("change:values", recolour);
    model.off("change:regions", later);
    model.off("change:chosen", choose);
  };
}

export default { render };
