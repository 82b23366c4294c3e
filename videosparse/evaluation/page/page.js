"use strict";
// The players: all videos of a prompt on one clock. The first one leads, the others are kept beside it.
(() => {
  const reels = JSON.parse(document.getElementById("reels").textContent);
  if (!reels.length) return;
  const byId = (id) => document.getElementById(id);
  const [size, prompt, players, play, scrub, frame, speed, shown] =
    ["size", "prompt", "players", "play", "scrub", "frame", "speed", "shown"].map(byId);
  let reel = reels[0];
  let videos = [];
  let addresses = [];
  let playing = false;
  let wanted = new Set();

  const option = (text, value) => Object.assign(document.createElement("option"), { textContent: text, value });

  function address(base64) {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const url = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
    addresses.push(url);
    return url;
  }

  function tell(at) {
    scrub.value = at;
    frame.textContent = `${at + 1} of ${reel.frames}`;
    scrub.setAttribute("aria-valuetext", `frame ${at + 1} of ${reel.frames}`);
  }

  // the middle of a frame, so that rounding shows no other
  const time = (at) => (at + 0.5) / reel.fps;
  const current = () => Math.min(reel.frames - 1, Math.floor(videos[0].currentTime * reel.fps));

  function seek(at) {
    const to = Math.max(0, Math.min(reel.frames - 1, at));
    for (const video of videos) video.currentTime = time(to);
    tell(to);
  }

  function stop() {
    playing = false;
    play.textContent = "Play";
    play.setAttribute("aria-label", "Play");
    for (const video of videos) video.pause();
  }

  async function start() {
    if (!videos.length) return;
    playing = true;
    play.textContent = "Pause";
    play.setAttribute("aria-label", "Pause");
    if (Number(scrub.value) >= reel.frames - 1) seek(0);
    const began = videos;
    await Promise.allSettled(began.map((video) => video.play()));
    if (began === videos && playing) requestAnimationFrame(tick);
  }

  function tick() {
    if (!playing || !videos.length) return;
    const [lead, ...others] = videos;
    const rate = Number(speed.value);
    lead.playbackRate = rate;
    for (const video of others) {
      const ahead = video.currentTime - lead.currentTime;
      if (Math.abs(ahead) > 1.5 / reel.fps) {
        video.currentTime = lead.currentTime;
      } else {
        video.playbackRate = rate * (1 - Math.max(-0.2, Math.min(0.2, 4 * ahead)));
      }
    }
    tell(current());
    if (lead.ended) {
      seek(0);
      for (const video of videos) video.play().catch(() => {});
    }
    requestAnimationFrame(tick);
  }

  function show() {
    const at = videos.length ? Number(scrub.value) : 0;
    const again = playing;
    stop();
    for (const video of videos) video.removeAttribute("src");
    for (const url of addresses) URL.revokeObjectURL(url);
    addresses = [];
    const chosen = reel.prompts[prompt.selectedIndex].videos.filter((one) => wanted.has(one.setting));
    players.replaceChildren();
    videos = chosen.map((one) => {
      const video = document.createElement("video");
      Object.assign(video, { muted: true, playsInline: true, preload: "auto", src: address(one.data) });
      video.style.aspectRatio = `${reel.width} / ${reel.height}`;
      video.setAttribute("aria-label", `${one.setting}: ${reel.prompts[prompt.selectedIndex].text}`);
      const name = Object.assign(document.createElement("b"), { textContent: one.setting, className: one.css });
      const note = Object.assign(document.createElement("span"), { textContent: one.note });
      const caption = document.createElement("figcaption");
      caption.append(name, note);
      const figure = document.createElement("figure");
      figure.append(video, caption);
      players.append(figure);
      return video;
    });
    scrub.max = reel.frames - 1;
    if (videos.length) {
      seek(Math.min(at, reel.frames - 1));
      if (again) start();
    }
  }

  function choose() {
    shown.querySelectorAll("label").forEach((label) => label.remove());
    const names = [...new Set(reel.prompts.flatMap((one) => one.videos.map((video) => video.setting)))];
    for (const name of names) {
      const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: wanted.has(name) });
      box.addEventListener("change", () => {
        if (box.checked) wanted.add(name);
        else wanted.delete(name);
        show();
      });
      const label = document.createElement("label");
      label.append(box, name);
      shown.append(label);
    }
  }

  function pick() {
    reel = reels[size.selectedIndex];
    wanted = new Set(reel.shown);
    prompt.replaceChildren(...reel.prompts.map((one, number) => option(one.text, number)));
    choose();
    show();
  }

  size.replaceChildren(...reels.map((one, number) => option(one.title, number)));
  size.addEventListener("change", pick);
  prompt.addEventListener("change", show);
  play.addEventListener("click", () => (playing ? stop() : start()));
  scrub.addEventListener("input", () => {
    stop();
    seek(Number(scrub.value));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (/^(INPUT|SELECT|BUTTON|TEXTAREA|A)$/.test(event.target.tagName)) return;
    const at = Number(scrub.value);
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: reel.frames - 1 }[event.key];
    if (event.key === " ") {
      event.preventDefault();
      if (playing) stop();
      else start();
    } else if (to !== undefined && videos.length) {
      event.preventDefault();
      stop();
      seek(to);
    }
  });
  pick();
})();
