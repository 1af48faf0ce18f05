/* One connection's HTTP/2: as much of it as a client of unary calls needs.
 *
 * Frames are written by hand, so that they are those of the client that is imitated: a call is HEADERS and DATA, and in
 * grpcio's style each is followed by a WINDOW_UPDATE (recorded from grpcio 1.85). What the server does wrong ends the
 * program; what it does wrong to a call is counted.
 */
#include "traffic.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4, PADDED = 8, WITH_PRIORITY = 32 };

#define HEAD 9               /* bytes before a frame's payload */
#define IN_ROOM (1 << 18)    /* bytes that are read at once; no frame that comes may be larger */
#define BLOCK_ROOM 4096      /* of a header block */
#define STREAM_SLOTS 65536   /* streams between the oldest in flight and the newest */
#define WINDOW (4 << 20)     /* bytes that may come on a connection, and on a stream, before more is granted */
#define DEFAULT_WINDOW 65535 /* HTTP/2's */

/* -- writing ------------------------------------------------------------------------------------------------------- */

static void put32(uint8_t *out, uint32_t value) {
    for (int i = 0; i < 4; i++)
        out[i] = (uint8_t)(value >> (24 - 8 * i));
}

static uint32_t get32(const uint8_t *in) {
    return (uint32_t)in[0] << 24 | (uint32_t)in[1] << 16 | (uint32_t)in[2] << 8 | in[3];
}

/* Room for `bytes` more at the end of what is to be written. */
static uint8_t *reserve(struct Connection *c, size_t bytes) {
    if (c->out_length + bytes > c->out_room) {
        c->out_room = 2 * (c->out_length + bytes);
        c->out = realloc(c->out, c->out_room);
        if (!c->out)
            die("out of memory");
    }
    return c->out + c->out_length;
}

static void head(uint8_t *out, size_t length, int type, int flags, uint32_t stream) {
    out[0] = (uint8_t)(length >> 16);
    out[1] = (uint8_t)(length >> 8);
    out[2] = (uint8_t)length;
    out[3] = (uint8_t)type;
    out[4] = (uint8_t)flags;
    put32(out + 5, stream);
}

static void put_frame(struct Connection *c, int type, int flags, uint32_t stream, const void *payload, size_t length) {
    uint8_t *out = reserve(c, HEAD + length);
    head(out, length, type, flags, stream);
    if (length)
        memcpy(out + HEAD, payload, length);
    c->out_length += HEAD + length;
}

static void grant(struct Connection *c, uint32_t stream, uint32_t bytes) {
    uint8_t payload[4];
    put32(payload, bytes);
    put_frame(c, WINDOW_UPDATE, 0, stream, payload, sizeof payload);
}

static void flush(struct Connection *c) {
    while (c->out_begin < c->out_length) {
        const uint8_t *from = c->out + c->out_begin;
        size_t left = c->out_length - c->out_begin;
        ssize_t written;
        if (c->ssl) {
            written = SSL_write(c->ssl, from, left < (1 << 30) ? (int)left : 1 << 30);
            if (written <= 0) {
                int error = SSL_get_error(c->ssl, (int)written);
                if (error != SSL_ERROR_WANT_WRITE && error != SSL_ERROR_WANT_READ)
                    die("the TLS connection broke while a request was written");
                c->blocked = true;
                return;
            }
        } else {
            written = write(c->fd, from, left);
            if (written < 0) {
                if (errno != EAGAIN && errno != EINTR)
                    die("the connection broke while a request was written: %s", strerror(errno));
                c->blocked = true;
                return;
            }
        }
        c->out_begin += (size_t)written;
    }
    c->out_begin = c->out_length = 0;
    c->blocked = false;
}

static void begin(struct Connection *c) {
    struct Load *load = c->load;
    uint32_t number = c->idle[--c->idle_count];
    struct Call *call = &c->calls[number];
    uint64_t turn = load->next++;
    const struct Request *request = &load->plan->requests[turn % load->plan->count];
    bool as_grpcio = load->metadata.style == GRPCIO;

    call->request = request;
    call->stream = c->next_stream;
    call->began = now_us();
    call->length = 0;
    call->status = -1;
    call->message[0] = 0;
    c->next_stream += 2;
    uint16_t *slot = &c->by_stream[call->stream / 2 % STREAM_SLOTS];
    if (*slot)
        die("stream %u has had no answer while %d later ones had theirs", c->calls[*slot - 1].stream, STREAM_SLOTS);
    *slot = (uint16_t)(number + 1);

    uint8_t *out = reserve(c, HEAD + BLOCK_ROOM);
    size_t block = headers_write(c->headers, out + HEAD, BLOCK_ROOM);
    head(out, block, HEADERS, END_HEADERS, call->stream);
    c->out_length += HEAD + block;
    if (as_grpcio)
        grant(c, call->stream, 5); /* it asks for the five bytes before the answer */
    put_frame(c, DATA, END_STREAM, call->stream, request->message, request->length);
    if (request->id_at) {
        for (int i = 0; i < ID_LENGTH; i++)
            call->id[i] = "0123456789abcdef"[turn >> (60 - 4 * i) & 15];
        memcpy(c->out + c->out_length - request->length + request->id_at, call->id, ID_LENGTH);
    }
    if (as_grpcio) {
        grant(c, 0, c->received > 5 ? c->received : 5);
        c->received = 0;
    }
    c->window -= request->length;
    load->totals.sent++;
    load->flying++;
}

void connection_write(struct Connection *c) {
    while (!c->load->stopping && c->idle_count) {
        uint32_t length = c->load->plan->requests[c->load->next % c->load->plan->count].length;
        if (length > c->window || length > c->stream_window)
            break;
        begin(c);
    }
    flush(c);
}

/* -- reading ------------------------------------------------------------------------------------------------------- */

static struct Call *call_of(struct Connection *c, uint32_t stream) {
    uint16_t number = c->by_stream[stream / 2 % STREAM_SLOTS];
    if (!(stream & 1) || !number || c->calls[number - 1].stream != stream)
        die("a frame came for stream %u, on which nothing is in flight", stream);
    return &c->calls[number - 1];
}

static void settle(struct Connection *c, struct Call *call, uint64_t now) {
    struct Totals *totals = &c->load->totals;
    struct Verdict verdict = {false, false};
    char problem[sizeof totals->first] = "";
    if (call->status == 0) {
        verdict = plan_check(c->load->plan, call->request, call->id, call->body, call->length, problem, sizeof problem);
        totals->wrong += !verdict.right;
    } else {
        snprintf(problem, sizeof problem, "grpc-status %d %s", call->status, call->message);
        totals->failed++;
    }
    totals->right += verdict.right;
    totals->inexact += verdict.inexact;
    if (!verdict.right && !totals->first[0])
        snprintf(totals->first, sizeof totals->first, "%s", problem);
    uint64_t took = now > call->began ? now - call->began : 0;
    struct {
        uint64_t ended;
        uint32_t took, right;
    } entry = {now, took < UINT32_MAX ? (uint32_t)took : UINT32_MAX, verdict.right};
    if (c->load->log && fwrite(&entry, sizeof entry, 1, c->load->log) != 1)
        die("the log cannot be written: %s", strerror(errno));
    c->by_stream[call->stream / 2 % STREAM_SLOTS] = 0;
    call->stream = 0;
    c->idle[c->idle_count++] = (uint32_t)(call - c->calls);
    c->load->flying--;
}

static void on_block(struct Connection *c, struct Call *call, const uint8_t *block, size_t length) {
    for (;;) {
        nghttp2_nv nv;
        int flags = 0;
        ssize_t used = nghttp2_hd_inflate_hd2(c->inflater, &nv, &flags, block, length, 1);
        if (used < 0)
            die("the server's header block cannot be read: %s", nghttp2_strerror((int)used));
        block += used;
        length -= (size_t)used;
        if (flags & NGHTTP2_HD_INFLATE_EMIT) {
            if (nv.namelen == 11 && !memcmp(nv.name, "grpc-status", 11))
                call->status = atoi((const char *)nv.value); /* nghttp2 ends it with a zero */
            else if (nv.namelen == 12 && !memcmp(nv.name, "grpc-message", 12))
                snprintf(call->message, sizeof call->message, "%s", (const char *)nv.value);
            else if (nv.namelen == 7 && !memcmp(nv.name, ":status", 7) && memcmp(nv.value, "200", 4))
                die("HTTP status %s came, expected 200", (const char *)nv.value);
        }
        if (flags & NGHTTP2_HD_INFLATE_FINAL || (!(flags & NGHTTP2_HD_INFLATE_EMIT) && !length))
            break;
    }
    nghttp2_hd_inflate_end_headers(c->inflater);
}

static void on_data(struct Call *call, const uint8_t *data, size_t length) {
    if (call->length + length > call->room) {
        call->room = 2 * (call->length + length);
        call->body = realloc(call->body, call->room);
        if (!call->body)
            die("out of memory");
    }
    memcpy(call->body + call->length, data, length);
    call->length += length;
}

static void on_settings(struct Connection *c, const uint8_t *payload, size_t length) {
    for (size_t i = 0; i + 6 <= length; i += 6) {
        uint32_t value = get32(payload + i + 2);
        switch (payload[i] << 8 | payload[i + 1]) {
        case NGHTTP2_SETTINGS_HEADER_TABLE_SIZE:
            if (value < 4096)
                die("the server wants a header table of %u bytes; fewer than 4096 are not supported", value);
            break;
        case NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE:
            c->stream_window = value;
            break;
        case NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS:
            if (value < c->load->streams)
                die("the server allows %u streams a connection, and %u are asked for", value, c->load->streams);
            break;
        }
    }
    put_frame(c, SETTINGS, ACK, 0, NULL, 0);
}

static void on_frame(struct Connection *c, const uint8_t *frame, size_t length, uint64_t now) {
    int type = frame[3], flags = frame[4];
    uint32_t stream = get32(frame + 5) & 0x7fffffff;
    const uint8_t *payload = frame + HEAD;
    if (type == DATA)
        c->received += (uint32_t)length;
    if ((type == DATA || type == HEADERS) && flags & PADDED) {
        if (!length || payload[0] >= length)
            die("a frame came with more padding than it has bytes");
        length -= 1 + (size_t)payload[0];
        payload++;
    }
    if (type == HEADERS && flags & WITH_PRIORITY) {
        if (length < 5)
            die("a HEADERS frame came that is too short");
        payload += 5;
        length -= 5;
    }
    struct Call *call;
    switch (type) {
    case HEADERS:
        if (!(flags & END_HEADERS))
            die("a header block came in several frames, which is not supported");
        call = call_of(c, stream);
        on_block(c, call, payload, length);
        if (flags & END_STREAM)
            settle(c, call, now);
        break;
    case DATA:
        call = call_of(c, stream);
        on_data(call, payload, length);
        if (flags & END_STREAM)
            settle(c, call, now); /* without trailers: no status, so it counts as failed */
        break;
    case RST_STREAM:
        call = call_of(c, stream);
        snprintf(call->message, sizeof call->message, "RST_STREAM %u", length == 4 ? get32(payload) : 0);
        call->status = -1;
        settle(c, call, now);
        break;
    case SETTINGS:
        if (!(flags & ACK))
            on_settings(c, payload, length);
        break;
    case PING:
        if (!(flags & ACK))
            put_frame(c, PING, ACK, 0, payload, length);
        break;
    case WINDOW_UPDATE:
        if (!stream && length == 4) /* a request is sent at once or not at all, so a stream's window needs no count */
            c->window += get32(payload) & 0x7fffffff;
        break;
    case GOAWAY:
        die("the server closes the connection: GOAWAY with error %u", length >= 8 ? get32(payload + 4) : 0);
    case PUSH_PROMISE:
    case CONTINUATION:
        die("a frame of type %d came, which a unary call has no use for", type);
    }
}

/* Whether something came. */
static bool fill(struct Connection *c) {
    uint8_t *to = c->in + c->in_length;
    size_t room = IN_ROOM - c->in_length;
    ssize_t came;
    if (c->ssl) {
        came = SSL_read(c->ssl, to, (int)room);
        if (came <= 0) {
            int error = SSL_get_error(c->ssl, (int)came);
            if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
                return false;
            die("the server closed the TLS connection");
        }
    } else {
        came = read(c->fd, to, room);
        if (came < 0 && (errno == EAGAIN || errno == EINTR))
            return false;
        if (came <= 0)
            die("the server closed the connection%s%s", came ? ": " : "", came ? strerror(errno) : "");
    }
    c->in_length += (size_t)came;
    return true;
}

void connection_read(struct Connection *c) {
    while (fill(c)) {
        uint64_t now = now_us();
        size_t at = 0;
        while (c->in_length - at >= HEAD) {
            const uint8_t *frame = c->in + at;
            size_t length = (size_t)frame[0] << 16 | (size_t)frame[1] << 8 | frame[2];
            if (HEAD + length > IN_ROOM)
                die("a frame of %zu bytes came; more than %d are not supported", length, IN_ROOM);
            if (c->in_length - at < HEAD + length)
                break;
            on_frame(c, frame, length, now);
            at += HEAD + length;
        }
        memmove(c->in, c->in + at, c->in_length - at);
        c->in_length -= at;
        if (!c->ssl)
            break; /* epoll tells of the rest; what TLS has decrypted it would not */
    }
    if (c->load->metadata.style == INDEXED && c->received > WINDOW / 2) {
        grant(c, 0, c->received);
        c->received = 0;
    }
    connection_write(c);
}

/* -- opening ------------------------------------------------------------------------------------------------------- */

static void greet(struct Connection *c) {
    static const char preface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    static const struct {
        uint16_t key;
        uint32_t value;
    } grpcio[] = {{2, 0}, {3, 0}, {4, WINDOW}, {5, WINDOW}, {6, 16384}, {0xfe03, 1}}, node[] = {{4, WINDOW}};
    bool as_grpcio = c->load->metadata.style == GRPCIO;
    size_t count = as_grpcio ? sizeof grpcio / sizeof *grpcio : sizeof node / sizeof *node;
    uint8_t settings[6 * 8];
    for (size_t i = 0; i < count; i++) {
        uint16_t key = as_grpcio ? grpcio[i].key : node[i].key;
        settings[6 * i] = (uint8_t)(key >> 8);
        settings[6 * i + 1] = (uint8_t)key;
        put32(settings + 6 * i + 2, as_grpcio ? grpcio[i].value : node[i].value);
    }
    memcpy(reserve(c, sizeof preface - 1), preface, sizeof preface - 1);
    c->out_length += sizeof preface - 1;
    put_frame(c, SETTINGS, 0, 0, settings, 6 * count);
    grant(c, 0, WINDOW - DEFAULT_WINDOW);
}

void connection_open(struct Connection *c, struct Load *load, int fd, SSL_CTX *tls) {
    *c = (struct Connection){.load = load, .fd = fd, .next_stream = 1};
    c->window = c->stream_window = DEFAULT_WINDOW;
    c->headers = headers_new(&load->metadata);
    c->calls = allocate(load->streams, sizeof *c->calls);
    c->idle = allocate(load->streams, sizeof *c->idle);
    c->by_stream = allocate(STREAM_SLOTS, sizeof *c->by_stream);
    c->in = allocate(IN_ROOM, 1);
    for (uint32_t i = load->streams; i-- > 0;)
        c->idle[c->idle_count++] = i;
    if (nghttp2_hd_inflate_new(&c->inflater))
        die("out of memory");
    if (tls) {
        c->ssl = SSL_new(tls);
        const unsigned char *protocol = NULL;
        unsigned length = 0;
        if (!c->ssl || !SSL_set_fd(c->ssl, fd) || SSL_connect(c->ssl) != 1)
            die("the TLS handshake failed");
        SSL_get0_alpn_selected(c->ssl, &protocol, &length);
        if (length != 2 || memcmp(protocol, "h2", 2))
            die("the server did not choose h2 by ALPN");
    }
    if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK))
        die("the socket cannot be made non-blocking: %s", strerror(errno));
    greet(c);
}
