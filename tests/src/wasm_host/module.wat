;; A module for this host's own tests; they say what it does. Memory: 0 to 1023 constants, 1024 results, 4096 heap.
(module
  (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
  (import "env" "proxy_set_tick_period_milliseconds" (func $period (param i32) (result i32)))
  (import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
  (import "env" "proxy_remove_header_map_value" (func $remove (param i32 i32 i32) (result i32)))
  (import "env" "proxy_replace_header_map_value" (func $replace (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_buffer_bytes" (func $buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_http_call" (func $call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (global $heap (mut i32) (i32.const 4096))

  (data (i32.const 0) "n")
  (data (i32.const 8) "x-bad")
  (data (i32.const 16) "x-v")
  (data (i32.const 24) "1")
  (data (i32.const 32) "tideshift_controller")
  ;; :method GET, :path /, :authority a
  (data (i32.const 64) "\03\00\00\00" "\07\00\00\00\03\00\00\00" "\05\00\00\00\01\00\00\00" "\0a\00\00\00\01\00\00\00"
    ":method\00GET\00" ":path\00/\00" ":authority\00a\00")

  (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
    global.get $heap
    (global.set $heap (i32.add (global.get $heap) (local.get $size))))

  (func (export "proxy_on_configure") (param $root i32) (param $size i32) (result i32)
    (drop (call $period (i32.const 1000)))
    (drop (call $define (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 1024)))
    local.get $size)

  (func (export "proxy_on_request_headers") (param $context i32) (param $count i32) (param $last i32) (result i32)
    (if (i32.eq (local.get $count) (i32.const 9)) (then unreachable))
    (drop (call $remove (i32.const 0) (i32.const 8) (i32.const 5)))
    (call $replace (i32.const 0) (i32.const 16) (i32.const 3) (i32.const 24) (i32.const 1)))

  (func (export "proxy_on_log") (param $context i32)
    (drop (call $increment (i32.load (i32.const 1024)) (i64.const 1))))

  (func (export "proxy_on_tick") (param $root i32)
    (drop (call $call (i32.const 32) (i32.const 20) (i32.const 64) (i32.const 67)
      (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 1000) (i32.const 1028))))

  ;; Logs the answer's body.
  (func (export "proxy_on_http_call_response") (param i32 i32) (param $headers i32) (param $body i32) (param i32)
    (drop (call $buffer (i32.const 4) (i32.const 0) (local.get $body) (i32.const 1032) (i32.const 1036)))
    (drop (call $log (i32.const 2) (i32.load (i32.const 1032)) (i32.load (i32.const 1036)))))
)
