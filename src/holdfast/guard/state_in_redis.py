"""State of the query detector and of rates in a Redis server, for several machines.

A batch of queries needs two calls: a script reads what the batch needs, and after the decision another one adds its
changes. Each script is atomic. Between the two calls the batches of other processes may be counted, so a score may miss
the queries that are in flight elsewhere; masses and budgets miss none.

Redis keeps its content in memory. Without persistence in Redis, a restart forgets all queries and budgets, which is
reported as `emptied`.
"""

import json
import secrets
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from holdfast.core.errors import Install, UsageError
from holdfast.guard.detectors.queries import (
    Account,
    Fail,
    Health,
    QueryCluster,
    StateLimits,
    StateView,
    SteadyClock,
    Wanted,
)
from holdfast.guard.state_in_memory import Charge, Grant, Reachability, sketch_bytes, sketches_from

_ATTEMPT_S = 0.25  # of a call, because a request waits for it
_RETRY_S = 1.0

# Numbers with a fraction are sent as text: Lua would convert them to integers in answers.
_CLOCK = """
local prefix = KEYS[1]
local clock = redis.call('HMGET', prefix .. 'clock', 'wall', 'steady', 'name')
"""
_READ = (
    _CLOCK
    + """
local wanted = cjson.decode(ARGV[1])
local buckets, clusters, seen = {}, {}, {}
for _, hash in ipairs(wanted.hashes) do
  local keys = redis.call('LRANGE', prefix .. 'b:' .. hash, 0, -1)
  if #keys > 0 then
    table.insert(buckets, {hash, keys})
    for _, key in ipairs(keys) do
      if not seen[key] then
        seen[key] = true
        local cluster = redis.call('HMGET', prefix .. 'c:' .. key, 'leader', 'mass', 'members', 'seen')
        if cluster[1] then table.insert(clusters, {key, cluster}) end
      end
    end
  end
end
local answered, accounts = {}, {}
for _, digest in ipairs(wanted.digests) do
  if redis.call('ZSCORE', prefix .. 'answers', digest) then table.insert(answered, digest) end
end
for _, name in ipairs(wanted.principals) do
  local account = redis.call('HMGET', prefix .. 'a:' .. name, 'queries', 'mass', 'seen')
  if account[1] then table.insert(accounts, {name, account}) end
end
return {clock, buckets, clusters, answered, accounts}
"""
)
_WRITE = (
    _CLOCK
    + """
local new = cjson.decode(ARGV[1])
local now, half, life = tonumber(ARGV[2]), new.half_life, new.lifetime
local steady = math.max(now, tonumber(clock[2] or '0'))
redis.call('HSET', prefix .. 'clock', 'wall', new.wall, 'steady', string.format('%.6f', steady),
  'name', clock[3] or new.name)
local function forget(key)
  local hashes = redis.call('HGET', prefix .. 'c:' .. key, 'hashes')
  if hashes then
    for _, hash in ipairs(cjson.decode(hashes)) do redis.call('LREM', prefix .. 'b:' .. hash, 0, key) end
  end
  redis.call('DEL', prefix .. 'c:' .. key)
  redis.call('ZREM', prefix .. 'clusters', key)
end
for _, each in ipairs(new.added) do
  local name = prefix .. 'c:' .. each.key
  redis.call('HSET', name, 'leader', each.leader, 'hashes', cjson.encode(each.hashes), 'mass', '0', 'members', 1,
    'seen', string.format('%.6f', steady))
  redis.call('EXPIRE', name, life)
  redis.call('ZADD', prefix .. 'clusters', steady, each.key)
  for _, hash in ipairs(each.hashes) do
    redis.call('RPUSH', prefix .. 'b:' .. hash, each.key)
    redis.call('EXPIRE', prefix .. 'b:' .. hash, life)
  end
end
for _, each in ipairs(new.dropped) do redis.call('LREM', prefix .. 'b:' .. each[1], 0, each[2]) end
for _, each in ipairs(new.touched) do
  local name = prefix .. 'c:' .. each[1]
  local old = redis.call('HMGET', name, 'mass', 'seen')
  if old[1] then
    local mass = tonumber(old[1]) * 0.5 ^ (math.max(0, steady - tonumber(old[2])) / half) + each[2]
    redis.call('HSET', name, 'mass', string.format('%.9g', math.min(mass, new.heaviest)), 'seen',
      string.format('%.6f', steady))
    redis.call('HINCRBY', name, 'members', each[3])
    redis.call('EXPIRE', name, life)
    redis.call('ZADD', prefix .. 'clusters', steady, each[1])
  end
end
for _, each in ipairs(new.charged) do
  local name = prefix .. 'a:' .. each[1]
  local old = redis.call('HMGET', name, 'queries', 'mass', 'seen')
  local factor = 0.5 ^ (math.max(0, steady - tonumber(old[3] or steady)) / half)
  redis.call('HSET', name, 'queries', string.format('%.9g', tonumber(old[1] or '0') * factor + each[2]), 'mass',
    string.format('%.9g', tonumber(old[2] or '0') * factor + each[3]), 'seen', string.format('%.6f', steady))
  redis.call('EXPIRE', name, life)
  redis.call('ZADD', prefix .. 'accounts', steady, each[1])
end
for _, digest in ipairs(new.answers) do redis.call('ZADD', prefix .. 'answers', 'NX', steady, digest) end
local excess = redis.call('ZCARD', prefix .. 'clusters') - new.clusters
local old = redis.call('ZRANGEBYSCORE', prefix .. 'clusters', '-inf', steady - life, 'LIMIT', 0, 64)
for _, key in ipairs(old) do forget(key) end
if excess > 0 then
  for _, key in ipairs(redis.call('ZRANGE', prefix .. 'clusters', 0, excess - 1)) do forget(key) end
end
redis.call('ZREMRANGEBYSCORE', prefix .. 'answers', '-inf', steady - life)
redis.call('ZREMRANGEBYRANK', prefix .. 'answers', 0, -new.digests - 1)
redis.call('ZREMRANGEBYSCORE', prefix .. 'accounts', '-inf', steady - life)
for _, name in ipairs(redis.call('ZRANGE', prefix .. 'accounts', 0, -new.accounts - 1)) do
  redis.call('DEL', prefix .. 'a:' .. name)
  redis.call('ZREM', prefix .. 'accounts', name)
end
return clock[3] or new.name
"""
)
# the same rules as `spending.spent`; a test compares both
_SPEND = (
    _CLOCK
    + """
local now = math.max(tonumber(ARGV[2]), tonumber(clock[2] or '0'))
redis.call('HSET', prefix .. 'clock', 'wall', ARGV[3], 'steady', string.format('%.6f', now),
  'name', clock[3] or ARGV[4])
local grants = {}
for _, each in ipairs(cjson.decode(ARGV[1])) do
  local name, n, rate, budget = prefix .. 'r:' .. each.name, each.n, each.rate, each.budget
  local old = redis.call('HMGET', name, 'tokens', 'seen', 'used', 'began')
  local tokens, used, began = each.burst, 0, now
  if old[1] then
    tokens = math.min(each.burst, tonumber(old[1]) + math.max(0, now - tonumber(old[2])) * math.max(rate, 0))
    if now < tonumber(old[4]) + each.period then used, began = tonumber(old[3]), tonumber(old[4]) end
  end
  local reason, wait = '', 0
  if (rate >= 0 and n > each.burst) or (budget >= 0 and n > budget) then
    reason = 'size'
  elseif budget >= 0 and used + n > budget then
    reason, wait = 'budget', began + each.period - now
  elseif rate >= 0 and n > tokens + 1e-9 then
    reason, wait = 'rate', (n - tokens) / rate
  else
    used = used + n
    if rate >= 0 then tokens = tokens - n end
  end
  redis.call('HSET', name, 'tokens', string.format('%.17g', tokens), 'seen', string.format('%.6f', now), 'used', used,
    'began', string.format('%.6f', began))
  redis.call('EXPIRE', name, math.ceil(math.max(each.period, rate > 0 and each.burst / rate or 0)) + 3600)
  table.insert(grants, {reason, string.format('%.6f', wait)})
end
return {clock, grants}
"""
)


class RedisState:
    """State in a Redis server, 6.2 or newer, that any number of processes and machines use.

    `url` is like `redis://user:password@host:6379/0`, or `rediss://` for TLS. `name` separates several states on one
    server. While the server cannot be reached, queries are handled as `fail` states; it is tried again each second.
    """

    def __init__(
        self, url: str, limits: StateLimits | None = None, *, fail: Fail = "closed", name: str = "holdfast"
    ) -> None:
        try:
            import redis
        except ImportError as error:
            raise UsageError(
                f"the state {name} is in Redis, and the package redis is not installed",
                Install("redis"),
            ) from error
        self.limits, self.fail = limits or StateLimits(), fail
        self._errors = (redis.RedisError, OSError)
        self._prefix = f"{{{name}}}:"  # braces put all keys into the same slot of a Redis Cluster
        self._lock, self._clock = Lock(), SteadyClock()
        self._reach = Reachability(f"state {name} in Redis", fail, _RETRY_S)
        self._id = secrets.token_hex(8)
        self._known: bytes | str | None = None
        try:
            self._redis = redis.Redis.from_url(
                url, socket_timeout=_ATTEMPT_S, socket_connect_timeout=_ATTEMPT_S
            )
        except ValueError as error:
            raise UsageError(
                f"the address of the state is not valid ({error}); expected redis://HOST:6379/0"
            ) from error
        self._read, self._write, self._spend = (
            self._redis.register_script(script) for script in (_READ, _WRITE, _SPEND)
        )

    @property
    def health(self) -> Health:
        """Whether the server can be reached, and how often it was lost or emptied."""
        return self._reach.health

    def exchange(self, wanted: Wanted, now: float, decide: Callable[[StateView], None]) -> bool:
        """Read, decide and store, like `QueryState.exchange`, in two atomic calls."""

        def work() -> bool:
            view = self._view(wanted, now)
            decide(view)
            changes = self._changes(view, now)
            self._known = self._write(keys=[self._prefix], args=[changes, f"{view.now:.6f}"])
            return True

        return self._run(work) is True

    def spend(self, charges: Sequence[Charge], now: float) -> list[Grant]:
        """Answer charges in one atomic call, like `SharedState.spend`."""

        def work() -> list[Grant]:
            clock = self._redis.hmget(f"{self._prefix}clock", "wall", "steady", "name")
            time = self._time(clock, now)
            requests = [
                {
                    "name": each.principal,
                    "n": each.n,
                    "rate": -1 if each.allowance.rate_per_s is None else each.allowance.rate_per_s,
                    "burst": each.allowance.burst,
                    "budget": -1 if each.allowance.budget is None else each.allowance.budget,
                    "period": each.allowance.period_s,
                }
                for each in charges
            ]
            _, grants = self._spend(
                keys=[self._prefix], args=[json.dumps(requests), f"{time:.6f}", f"{now:.6f}", self._id]
            )
            return [Grant(not reason, reason.decode(), float(wait)) for reason, wait in grants]

        refused = [Grant(granted=self.fail == "open", reason="lost", lost=True) for _ in charges]
        return self._run(work) or refused

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _run(self, work: Callable[[], Any]) -> Any:
        """Return the result of `work`, or None after reporting that the server cannot be reached."""
        with self._lock:
            if self._reach.waiting:
                return None
            try:
                result = work()
            except self._errors as error:
                self._reach.lost(error)
                return None
            self._reach.reached()
            return result

    def _time(self, clock: Sequence[bytes | str | None], now: float) -> float:
        """Time of the state, from what the server stores about it; reports if the server was emptied."""
        wall, steady, name = clock
        if self._known is not None and name != self._known:
            self._reach.emptied()
        self._known = name
        return self._clock.at(now, None if wall is None or steady is None else (float(wall), float(steady)))

    def _view(self, wanted: Wanted, now: float) -> StateView:
        request = {
            "hashes": [str(each) for each in dict.fromkeys(wanted.hashes.ravel().tolist())],
            "digests": [str(each) for each in wanted.digests],
            "principals": list(wanted.principals),
        }
        clock, buckets, clusters, answered, accounts = self._read(
            keys=[self._prefix], args=[json.dumps(request)]
        )
        leaders = sketches_from([bytes.fromhex(leader.decode()) for _, (leader, *_) in clusters])
        return StateView(
            self._time(clock, now),
            self.limits.half_life_s,
            {
                int(key): QueryCluster(int(key), leader, float(mass), int(members), float(seen))
                for (key, (_, mass, members, seen)), leader in zip(clusters, leaders, strict=True)
            },
            {int(each): [int(key) for key in keys] for each, keys in buckets},
            {int(each) for each in answered},
            {
                name.decode(): Account(float(queries), float(mass), float(seen))
                for name, (queries, mass, seen) in accounts
            },
        )

    def _changes(self, view: StateView, now: float) -> str:
        added = [
            {
                "key": str(key),
                "leader": sketch_bytes(view.clusters[key].leader).hex(),
                "hashes": [str(h) for h in hashes],
            }
            for key, hashes in view.added.items()
        ]
        return json.dumps(
            {
                "added": added,
                "touched": [[str(key), mass, n] for key, (mass, n) in view.touched.items()],
                "charged": [[name, n, mass] for name, (n, mass) in view.charged.items()],
                "answers": [str(each) for each in view.answers],
                "dropped": [[str(each), str(key)] for each, key in view.dropped],
                "wall": f"{now:.6f}",
                "name": self._id,
                "half_life": self.limits.half_life_s,
                "lifetime": int(self.limits.lifetime_s) + 1,
                "heaviest": self.limits.heaviest,
                "clusters": self.limits.clusters,
                "digests": self.limits.digests,
                "accounts": self.limits.accounts,
            }
        )
