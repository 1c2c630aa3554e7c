"use strict";
// Two videos under one control. Lengths and rates may differ: both are at the same share of their length.

const IN_STEP_S = 0.05; // farther apart than this, the follower is put where it belongs

class Player {
  // slider: the control, from 0 to 1000. onMove: is told the share that is over, on every frame that is shown.
  constructor(videos, slider, button, onMove) {
    this.sources = videos; // [{video, src, onError}], the leader last
    this.slider = slider;
    this.button = button;
    this.onMove = onMove;
    this.progress = 0;
    this.wanted = false;
    this.attached = false;
    button.onclick = () => (this.wanted ? this.pause() : this.play());
    slider.oninput = () => this.seek(slider.value / 1000);
    for (const source of videos) {
      source.video.muted = true;
      source.video.playsInline = true;
      source.video.addEventListener("loadedmetadata", () => (canSeek(source.video) ? this.place() : this.fetchWhole(source)));
      source.video.addEventListener("canplay", () => this.wanted && this.resume());
      source.video.addEventListener("error", () => this.attached && this.lose(source));
      source.video.addEventListener("ended", () => source.video === this.leader && this.again());
    }
  }

  get videos() {
    return this.sources.map((source) => source.video).filter((video) => video.duration > 0);
  }

  get leader() {
    return this.videos.at(-1);
  }

  get longest() {
    return Math.max(...this.videos.map((video) => video.duration));
  }

  // Files are asked for only while the card is near the window.
  attach() {
    if (this.attached) return;
    this.attached = true;
    for (const { video, src } of this.sources) {
      video.preload = "auto";
      video.src = src;
    }
  }

  detach() {
    if (!this.attached) return;
    this.attached = false;
    cancelAnimationFrame(this.frame);
    for (const { video } of this.sources) {
      video.pause();
      if (video.src.startsWith("blob:")) URL.revokeObjectURL(video.src);
      video.removeAttribute("src");
      video.load();
    }
  }

  async fetchWhole(source) {
    try {
      const video = await (await fetch(source.src)).blob();
      if (this.attached) source.video.src = URL.createObjectURL(video);
    } catch {
      if (this.attached) this.lose(source);
    }
  }

  lose(source) {
    this.sources = this.sources.filter((other) => other !== source);
    source.onError();
    if (this.wanted) this.resume();
  }

  play() {
    this.wanted = true;
    this.told();
    this.resume();
  }

  pause() {
    this.wanted = false;
    this.told();
    cancelAnimationFrame(this.frame);
    for (const { video } of this.sources) video.pause();
    this.place();
  }

  // Plays as soon as every video can: none runs ahead while another still loads.
  resume() {
    const ready = this.sources.length && this.sources.every(({ video }) => video.readyState >= 3);
    if (!this.attached || !this.wanted || !ready) return;
    if (this.progress >= 0.999) this.progress = 0;
    this.place();
    for (const video of this.videos) {
      video.playbackRate = Math.min(16, Math.max(0.0625, video.duration / this.longest));
      video.play().catch(() => {}); // taken away or paused again before it began
    }
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => this.follow());
  }

  again() {
    if (!this.wanted) return;
    this.progress = 0;
    this.resume();
  }

  follow() {
    const { leader } = this;
    if (!this.wanted || !leader) return;
    if (!leader.ended && !leader.seeking) {
      this.progress = leader.currentTime / leader.duration;
      for (const video of this.videos) {
        const due = this.progress * video.duration;
        if (video !== leader && !video.seeking && Math.abs(video.currentTime - due) > IN_STEP_S) video.currentTime = due;
        if (video !== leader && video.paused && !video.ended) video.play().catch(() => {});
      }
      this.show();
    }
    this.frame = requestAnimationFrame(() => this.follow());
  }

  seek(progress) {
    this.progress = progress;
    this.place();
  }

  // Puts every video where the control says; the last frame is before a video's end.
  place() {
    for (const video of this.videos) {
      const due = Math.min(this.progress * video.duration, video.duration - 0.001);
      if (Math.abs(video.currentTime - due) > 0.001) video.currentTime = due;
    }
    this.show();
  }

  show() {
    this.slider.value = Math.round(1000 * this.progress);
    const length = this.videos.length ? this.longest : 0;
    this.slider.setAttribute("aria-valuetext", `${(this.progress * length).toFixed(1)} of ${length.toFixed(1)} seconds`);
    this.onMove(this.progress);
  }

  told() {
    this.button.textContent = this.wanted ? "❚❚" : "▶";
    this.button.setAttribute("aria-label", this.wanted ? "Pause" : "Play");
  }
}

// Some web servers, such as Python's own, send no parts of files: one can then seek only in what was fetched whole.
function canSeek(video) {
  return !location.protocol.startsWith("http") || video.src.startsWith("blob:") || (video.seekable.length > 0 && video.seekable.end(0) > 0);
}
