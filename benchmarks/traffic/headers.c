/* Header blocks of calls whose fields differ, in two styles.
 *
 * GRPCIO writes what grpcio's C-core writes (recorded from grpcio 1.85): constant fields once and indexed from then on;
 * traceparent as a literal that is not indexed; nothing in Huffman's code. Deadlines are rounded (10 ms from a second
 * on), and a deadline takes the entry of an earlier one which is at most 3 % longer while the table still has it.
 *
 * INDEXED leaves the block to nghttp2's encoder, with the fields and the order of Node's @grpc/grpc-js (recorded from
 * 1.14, whose encoder is nghttp2's too): whatever differs is indexed and Huffman-coded at every call, as Go's and Java's
 * encoders do, so the table turns over and constant fields are sent anew now and then. :path is never indexed.
 */
#include "traffic.h"

#include <stdlib.h>
#include <string.h>

#define PATH "/inference.GRPCInferenceService/ModelInfer"
#define LEAST_MS 2000 /* a deadline: what is left of ten seconds */
#define MOST_MS 9999
#define TABLE 4096 /* bytes of the dynamic table: HPACK's default */
#define SLOTS 256  /* more entries than the table can have */

struct Timeout {
    double ms;
    uint64_t entry;
};

struct Headers {
    const struct Metadata *metadata;
    nghttp2_hd_deflater *deflater; /* INDEXED */
    /* GRPCIO: the dynamic table, as sizes alone. Entries are numbered from 1; those up to `evicted` are gone. */
    uint64_t added, evicted;
    uint32_t sizes[SLOTS], size;
    uint64_t path, authority, content_type, te, accept_encoding, user_agent; /* their entries; 0: none yet */
    struct Timeout timeouts[SLOTS];
    unsigned timeout_count;
};

uint64_t random_bits(void) {
    static uint64_t state = 0x9e3779b97f4a7c15u;
    uint64_t bits = state += 0x9e3779b97f4a7c15u; /* splitmix64: the same sequence in every run */
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9u;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111ebu;
    return bits ^ bits >> 31;
}

static void hexadecimal(char *out, uint64_t bits) {
    for (int i = 0; i < 16; i++)
        out[i] = "0123456789abcdef"[bits >> (60 - 4 * i) & 15];
}

/* 00-(32 digits)-(16 digits)-01, as the W3C has it. */
static void traceparent(char out[56]) {
    memcpy(out, "00-", 3);
    hexadecimal(out + 3, random_bits());
    hexadecimal(out + 19, random_bits());
    out[35] = '-';
    hexadecimal(out + 36, random_bits());
    memcpy(out + 52, "-01", 4);
}

static unsigned timeout_ms(void) { return LEAST_MS + (unsigned)(random_bits() % (MOST_MS - LEAST_MS + 1)); }

struct Headers *headers_new(const struct Metadata *metadata) {
    struct Headers *headers = allocate(1, sizeof *headers);
    headers->metadata = metadata;
    if (metadata->style == INDEXED && nghttp2_hd_deflate_new(&headers->deflater, TABLE))
        die("out of memory");
    return headers;
}

/* -- GRPCIO -------------------------------------------------------------------------------------------------------- */

static uint8_t *literal(uint8_t *out, uint8_t kind, const char *name, const char *value) {
    size_t name_length = strlen(name), value_length = strlen(value);
    if (name_length >= 127 || value_length >= 127)
        die("a header of 127 bytes or more: %s", name);
    *out++ = kind;
    *out++ = (uint8_t)name_length;
    memcpy(out, name, name_length);
    out += name_length;
    *out++ = (uint8_t)value_length;
    memcpy(out, value, value_length);
    return out + value_length;
}

static uint8_t *indexed(struct Headers *headers, uint8_t *out, uint64_t entry) {
    uint64_t index = 62 + headers->added - entry;
    if (index < 127) {
        *out++ = (uint8_t)(0x80 | index);
        return out;
    }
    *out++ = 0xff;
    for (index -= 127; index >= 128; index >>= 7)
        *out++ = (uint8_t)(0x80 | (index & 0x7f));
    *out++ = (uint8_t)index;
    return out;
}

/* A literal that the table takes up; its entry goes to `*entry`. */
static uint8_t *added(struct Headers *headers, uint8_t *out, uint64_t *entry, const char *name, const char *value) {
    uint32_t size = (uint32_t)(32 + strlen(name) + strlen(value));
    while (headers->size + size > TABLE)
        headers->size -= headers->sizes[++headers->evicted % SLOTS];
    headers->size += size;
    *entry = ++headers->added;
    headers->sizes[*entry % SLOTS] = size;
    return literal(out, 0x40, name, value);
}

static uint8_t *constant(struct Headers *headers, uint8_t *out, uint64_t *entry, const char *name, const char *value) {
    return *entry > headers->evicted ? indexed(headers, out, *entry) : added(headers, out, entry, name, value);
}

static uint8_t *rounded_timeout(struct Headers *headers, uint8_t *out) {
    unsigned tens = (timeout_ms() + 9) / 10; /* rounded up to 10 ms, which is what it does below ten seconds */
    double ms = tens * 10.0;
    for (unsigned i = 0; i < headers->timeout_count; i++) {
        struct Timeout *earlier = &headers->timeouts[i];
        double ratio = 100 * (ms / earlier->ms - 1);
        if (ratio > -3 && ratio <= 0 && earlier->entry > headers->evicted) {
            out = indexed(headers, out, earlier->entry);
            struct Timeout front = headers->timeouts[0];
            headers->timeouts[0] = *earlier;
            *earlier = front;
            return out;
        }
    }
    while (headers->timeout_count && headers->timeouts[headers->timeout_count - 1].entry <= headers->evicted)
        headers->timeout_count--;
    char value[16];
    snprintf(value, sizeof value, tens % 100 ? "%u0m" : "%uS", tens % 100 ? tens : tens / 100);
    if (headers->timeout_count == SLOTS)
        headers->timeout_count--;
    struct Timeout *new = &headers->timeouts[headers->timeout_count++];
    new->ms = ms;
    return added(headers, out, &new->entry, "grpc-timeout", value);
}

static size_t write_grpcio(struct Headers *headers, uint8_t *out) {
    const struct Metadata *metadata = headers->metadata;
    uint8_t *at = out;
    at = constant(headers, at, &headers->path, ":path", PATH);
    at = constant(headers, at, &headers->authority, ":authority", metadata->authority);
    *at++ = 0x83; /* :method POST */
    *at++ = metadata->tls ? 0x87 : 0x86;
    at = constant(headers, at, &headers->content_type, "content-type", "application/grpc");
    at = constant(headers, at, &headers->te, "te", "trailers");
    at = constant(headers, at, &headers->accept_encoding, "grpc-accept-encoding", "identity, deflate, gzip");
    if (metadata->timeout)
        at = rounded_timeout(headers, at);
    at = constant(headers, at, &headers->user_agent, "user-agent", metadata->user_agent);
    if (metadata->traceparent) {
        char value[56];
        traceparent(value);
        at = literal(at, 0x00, "traceparent", value);
    }
    return (size_t)(at - out);
}

/* -- INDEXED ------------------------------------------------------------------------------------------------------- */

static nghttp2_nv field(const char *name, const char *value) {
    return (nghttp2_nv){(uint8_t *)name, (uint8_t *)value, strlen(name), strlen(value), NGHTTP2_NV_FLAG_NONE};
}

static size_t write_indexed(struct Headers *headers, uint8_t *out, size_t room) {
    const struct Metadata *metadata = headers->metadata;
    char trace[56], timeout[16];
    nghttp2_nv fields[12];
    size_t count = 0;
    fields[count++] = field(":authority", metadata->authority);
    fields[count++] = field(":method", "POST");
    fields[count++] = field(":path", PATH);
    fields[count++] = field(":scheme", metadata->tls ? "https" : "http");
    if (metadata->traceparent) {
        traceparent(trace);
        fields[count++] = field("traceparent", trace);
    }
    fields[count++] = field("grpc-accept-encoding", "identity,deflate,gzip");
    fields[count++] = field("accept-encoding", "identity");
    if (metadata->timeout) {
        snprintf(timeout, sizeof timeout, "%um", timeout_ms());
        fields[count++] = field("grpc-timeout", timeout);
    }
    fields[count++] = field("user-agent", metadata->user_agent);
    fields[count++] = field("content-type", "application/grpc");
    fields[count++] = field("te", "trailers");
    ssize_t length = nghttp2_hd_deflate_hd(headers->deflater, out, room, fields, count);
    if (length < 0)
        die("nghttp2 cannot write a header block: %s", nghttp2_strerror((int)length));
    return (size_t)length;
}

size_t headers_write(struct Headers *headers, uint8_t *out, size_t room) {
    return headers->metadata->style == GRPCIO ? write_grpcio(headers, out) : write_indexed(headers, out, room);
}
