// What happens on the server while the page is open: replies that are being generated for anybody, and alerts.

import { follow } from "./api.js";
import { Conversation } from "./conversation.js";

const KEPT = 20; // replies that have ended, so that one can still be opened

export const traffic = {
  /** Id of the trace to {trace, key, model, since, ended, conversation}; newest last. */
  replies: new Map(),
};

const watchers = new Set();
/** `watcher(event, reply, data)`: event is open, reply, token, alert or done. */
export const onTraffic = (watcher) => {
  watchers.add(watcher);
};

function happened(event, data) {
  let reply = traffic.replies.get(data.trace);
  if (event === "open")
    traffic.replies.forEach((one) => {
      one.ended ||= "lost";
    });
  else if (!reply && event !== "alert" && event !== "done") {
    reply = {
      trace: data.trace,
      key: data.key || "",
      model: data.model ?? "",
      since: Date.now(),
      ended: "",
      conversation: new Conversation(),
    };
    reply.conversation.id = data.trace;
    traffic.replies.set(data.trace, reply);
    for (const [id, one] of traffic.replies) if (traffic.replies.size > KEPT && one.ended) traffic.replies.delete(id);
  }
  if (reply) {
    if (event === "token") reply.conversation.push({ role: "assistant", ...data });
    if (event === "alert") reply.conversation.alerts.push(data);
    if (event === "done") reply.ended = data.finish ?? "stop";
  }
  watchers.forEach((watcher) => watcher(event, reply, data));
}

export const watchTraffic = () => follow(happened);
