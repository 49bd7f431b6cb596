// paging: where a position of a sequence lies in a KV cache [page, kv_head, token, dim].

override PAGE: u32;  // tokens a page
override KV_HEADS: u32;

// The row of the cache; `page` is the page that holds the position.
fn kv_row(page: u32, head: u32, position: u32) -> u32 {
  return (page * KV_HEADS + head) * PAGE + position % PAGE;
}
