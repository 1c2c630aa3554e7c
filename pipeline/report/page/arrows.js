"use strict";
// The motion that was read from a reference, as arrows over it: where each patch goes until the next latent frame.

const ARROWS_PER_SIDE = 24;

class Arrows {
  constructor(canvas) {
    this.canvas = canvas;
    this.motion = null;
    this.shown = -1;
    new ResizeObserver(() => this.draw(true)).observe(canvas);
  }

  set(motion) {
    this.motion = motion;
    this.canvas.hidden = !motion;
    this.draw(true);
  }

  // Follows the clip, of which `progress` (0 to 1) is over.
  at(progress) {
    this.progress = progress;
    this.draw(false);
  }

  draw(anew) {
    if (!this.motion) return;
    const [frames, height, width] = this.motion.grid;
    const step = Math.min(frames - 2, Math.floor((this.progress ?? 0) * (frames - 1)));
    if (step === this.shown && !anew) return;
    this.shown = step;
    const { canvas } = this;
    const sharpness = window.devicePixelRatio || 1;
    canvas.width = Math.round(canvas.clientWidth * sharpness);
    canvas.height = Math.round(canvas.clientHeight * sharpness);
    const pen = canvas.getContext("2d");
    const [across, down] = [canvas.width / width, canvas.height / height];
    const every = Math.ceil(Math.max(height, width) / ARROWS_PER_SIDE);
    const offset = (every - 1) >> 1;
    for (let y = offset; y < height; y += every) {
      for (let x = offset; x < width; x += every) {
        const place = 2 * ((step * height + y) * width + x);
        const [dx, dy] = [this.motion.moves[place], this.motion.moves[place + 1]];
        arrow(pen, (x + 0.5) * across, (y + 0.5) * down, dx * across, dy * down, sharpness);
      }
    }
  }
}

// One arrow, dark below and coloured by its direction above, so that it is seen on any picture; a dot for no motion.
function arrow(pen, x, y, dx, dy, sharpness) {
  const length = Math.hypot(dx, dy);
  if (length < 1) {
    pen.fillStyle = "rgba(0, 0, 0, 0.55)";
    pen.beginPath();
    pen.arc(x, y, 1.8 * sharpness, 0, 2 * Math.PI);
    pen.fill();
    pen.fillStyle = "rgba(255, 255, 255, 0.9)";
    pen.beginPath();
    pen.arc(x, y, 1.1 * sharpness, 0, 2 * Math.PI);
    pen.fill();
    return;
  }
  const angle = Math.atan2(dy, dx);
  const head = Math.min(7 * sharpness, 0.6 * length);
  const path = new Path2D();
  path.moveTo(x, y);
  path.lineTo(x + dx, y + dy);
  for (const turn of [2.6, -2.6]) {
    path.moveTo(x + dx, y + dy);
    path.lineTo(x + dx + head * Math.cos(angle + turn), y + dy + head * Math.sin(angle + turn));
  }
  pen.lineCap = "round";
  for (const [colour, thickness] of [["rgba(0, 0, 0, 0.7)", 3.6], [`hsl(${(angle * 180) / Math.PI} 100% 68%)`, 1.8]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = thickness * sharpness;
    pen.stroke(path);
  }
}
